//! The C interface as C sees it: programs in `tests/capi/` built by gcc against the header and the library, with the
//! address and leak sanitizers; and what can only be seen from here: symbols, layouts, panics.
#![cfg(target_os = "linux")]
#![allow(unsafe_code, reason = "functions of C are called")]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, c_int, c_void};
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::{null, null_mut};

use kinglet::capi::*;

const TINY: &str = "tests/data/lfm2-tiny-random.gguf";
const SMALL: &str = "models/lfm2-smol-Q4_0.gguf";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where cargo has put the libraries that it made with this test.
fn built() -> PathBuf {
    let this = std::env::current_exe().expect("a running program has a path");
    let folder = this.parent().expect("target/release/deps/capi");
    assert!(folder.join("libkinglet.so").exists(), "{folder:?}");
    folder.into()
}

fn run(command: &mut Command) -> String {
    // cargo's, which names the folder of another build before that of this one.
    command.env_remove("LD_LIBRARY_PATH");
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{out}{err}",
        output.status
    );
    out
}

/// Builds one of the programs; `flags` are those of the language.
fn build(compiler: &str, flags: &[&str], source: &Path, name: &str) -> PathBuf {
    let built = built();
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    run(Command::new(compiler)
        .args(flags)
        .args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-O1", "-g"])
        .arg("-I")
        .arg(root().join("src/capi"))
        .arg(source)
        .arg("-o")
        .arg(&program)
        .arg("-L")
        .arg(&built)
        .arg(format!("-Wl,-rpath,{}", built.display()))
        .args(["-lkinglet", "-lpthread"]));
    program
}

const C99: &[&str] = &[
    "-std=c99",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover",
];

fn program(name: &str) -> Command {
    let source = root().join("tests/capi").join(format!("{name}.c"));
    let mut command = Command::new(build("gcc", C99, &source, name));
    command
        .current_dir(root())
        .env("ASAN_OPTIONS", "detect_leaks=1");
    command
}

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).expect("a folder for tests");
    folder
}

#[test]
fn every_function_says_what_is_wrong() {
    run(program("arguments")
        .arg(SMALL)
        .arg(folder("capi-arguments"))
        .arg(TINY));
}

#[test]
fn conversations_come_to_what_a_fresh_one_comes_to() {
    print!(
        "{}",
        run(program("chat").arg(SMALL).arg(folder("capi-chat")))
    );
}

#[test]
fn the_header_is_cpp_too() {
    let source = folder("capi-cpp").join("main.cpp");
    let text = "#include \"kinglet.h\"\n#include \"kinglet.h\"\nint main() { return kinglet_version() == nullptr; }\n";
    std::fs::write(&source, text).expect("the folder is ours");
    run(&mut Command::new(build(
        "g++",
        &["-std=c++11"],
        &source,
        "cpp",
    )));
}

/// The header without comments.
fn header() -> String {
    let text = std::fs::read_to_string(root().join("src/capi/kinglet.h")).expect("it is there");
    let mut code = String::new();
    let mut rest = text.as_str();
    while let Some((before, after)) = rest.split_once("/*") {
        code.push_str(before);
        rest = after.split_once("*/").expect("comments end").1;
    }
    code + rest
}

fn declared() -> BTreeSet<String> {
    let code = header();
    let calls = code.match_indices('(').map(|(at, _)| &code[..at]);
    let names = calls.filter_map(|before| {
        let start = before.rfind(|c: char| !c.is_ascii_alphanumeric() && c != '_')? + 1;
        before[start..]
            .starts_with("kinglet_")
            .then(|| before[start..].to_owned())
    });
    names.collect()
}

#[test]
fn exported_are_the_functions_of_the_header() {
    let listed = run(Command::new("nm")
        .args(["-D", "--defined-only"])
        .arg(built().join("libkinglet.so")));
    let exported: BTreeSet<_> = listed
        .lines()
        .filter_map(|line| line.split(' ').nth(2))
        .map(str::to_owned)
        .collect();
    assert_eq!(exported, declared());
    assert!(exported.len() > 30);
}

/// `size` or `offset` of each struct and field, as Rust has them: struct, what, number.
fn layouts() -> Vec<(String, String, usize)> {
    let mut expected = Vec::new();
    macro_rules! fields {
        ($($name:ident: $($field:ident)*;)*) => {$(
            expected.push((stringify!($name).to_owned(), format!("sizeof({})", stringify!($name)), size_of::<$name>()));
            $(expected.push((
                stringify!($name).to_owned(),
                format!("offsetof({}, {})", stringify!($name), stringify!($field)),
                offset_of!($name, $field),
            ));)*
        )*};
    }
    fields! {
        kinglet_model_params: struct_size memory degrade threads threads_batch reserved cancel repack reserved_2;
        kinglet_model_info: struct_size n_params weight_bytes n_ctx_train n_vocab hidden n_layers has_chat_template threads;
        kinglet_session_params: struct_size n_ctx batch keys values reserved;
        kinglet_plan: struct_size total weights own_weights experts kv conv scratch tokenizer runtime program n_ctx batch
            keys values n_concessions;
        kinglet_session_info: struct_size n_ctx n_tokens n_messages kv conv scratch;
        kinglet_text: text text_len;
        kinglet_generate_params: struct_size max_tokens stops n_stops ignore_end reserved cancel json_schema
            json_schema_len grammar grammar_len;
        kinglet_profile_params: struct_size n_prompt n_gen;
        kinglet_embed_params: struct_size pooling raw cancel;
        kinglet_reply: struct_size finish reserved prompt_tokens reused_tokens reply_tokens prefill_ns first_token_ns
            decode_ns;
        kinglet_chunk: kind status text text_len done total;
    }
    expected
}

#[test]
fn both_sides_lay_structs_out_alike() {
    let expected = layouts();
    // No struct, and no field, is missing above: a `;` ends each field of the header.
    let code = header();
    let structs = code.split("typedef struct ").skip(1);
    for body in structs.filter(|body| body.find([';', '{']) == body.find('{')) {
        let (name, body) = body.split_once(" {").expect("it has fields");
        let n = body
            .split_once("} ")
            .expect("structs end")
            .0
            .matches(';')
            .count();
        assert_eq!(
            expected.iter().filter(|(of, ..)| of == name).count(),
            n + 1,
            "{name}"
        );
    }
    let checks = expected
        .iter()
        .map(|(_, what, n)| format!("CHECK({what} == {n});\n"));
    let text = format!(
        "#include <stddef.h>\n#include \"{}\"\nint main(void) {{\nCHECK(sizeof(kinglet_status) == 4);\n{}return 0;\n}}\n",
        root().join("tests/capi/common.h").display(),
        checks.collect::<String>()
    );
    let source = folder("capi-layout").join("layout.c");
    std::fs::write(&source, text).expect("the folder is ours");
    run(&mut Command::new(build(
        "gcc",
        &["-std=c99", "-Wno-unused-function"],
        &source,
        "layout",
    )));
}

#[test]
fn a_panic_ends_one_session() {
    unsafe extern "C-unwind" fn panics(_: *const kinglet_chunk, _: *mut c_void) -> c_int {
        panic!("on purpose: {}", 7)
    }
    unsafe extern "C-unwind" fn goes_on(_: *const kinglet_chunk, _: *mut c_void) -> c_int {
        0
    }
    let path = root().join(SMALL);
    let path = path.to_str().expect("UTF-8");
    let (mut runtime, mut model) = (null_mut(), null_mut());
    let mut sessions = [null_mut(); 3];
    let params = kinglet_generate_params {
        struct_size: size_of::<kinglet_generate_params>(),
        max_tokens: 2,
        stops: null(),
        n_stops: 0,
        ignore_end: 1,
        reserved: 0,
        cancel: null_mut(),
        json_schema: null(),
        json_schema_len: 0,
        grammar: null(),
        grammar_len: 0,
    };
    let send = |session, on_chunk| {
        // SAFETY: a text with its length, and a struct with its size.
        unsafe {
            kinglet_session_complete(
                session,
                c"x".as_ptr(),
                1,
                &params,
                null_mut(),
                Some(on_chunk),
                null_mut(),
            )
        }
    };
    // SAFETY: every pointer is to a variable of this test, lengths are those of the texts.
    unsafe {
        assert_eq!(kinglet_runtime_create(&mut runtime), Status::Ok);
        let loaded = kinglet_model_load(
            &mut model,
            runtime,
            path.as_ptr().cast(),
            path.len(),
            null(),
        );
        assert_eq!(loaded, Status::Ok);
        for session in &mut sessions {
            assert_eq!(kinglet_session_create(session, model, null()), Status::Ok);
        }
        let [first, second, third] = sessions;
        assert_eq!(send(first, panics), Status::Panic);
        let last = CStr::from_ptr(kinglet_error_last()).to_str();
        assert_eq!(last, Ok("panic: on purpose: 7"));
        assert_eq!(send(first, goes_on), Status::Poisoned);
        let mut fork = null_mut();
        assert_eq!(kinglet_session_fork(&mut fork, first), Status::Poisoned);
        assert!(fork.is_null());
        assert_eq!(send(second, goes_on), Status::Ok);
        // On the thread of requests, which goes on.
        let mut request = null_mut();
        let start = |request, session, on_chunk| {
            kinglet_request_start(
                request,
                session,
                c"x".as_ptr(),
                1,
                &params,
                on_chunk,
                null_mut(),
            )
        };
        assert_eq!(start(&mut request, third, Some(panics)), Status::Ok);
        let waited = kinglet_request_wait(request, 60_000, null_mut());
        assert_eq!(waited, Status::Panic);
        kinglet_request_release(request);
        assert_eq!(start(&mut request, second, Some(goes_on)), Status::Ok);
        let waited = kinglet_request_wait(request, 60_000, null_mut());
        assert_eq!(waited, Status::Ok);
        kinglet_request_release(request);
    }
    for session in sessions {
        kinglet_session_release(session);
    }
    kinglet_model_release(model);
    kinglet_runtime_release(runtime);
}

/// A declaration of C without needless spaces: `kinglet_status f(kinglet_x **out, size_t n)`.
fn tidy(declaration: &str) -> String {
    let words = declaration.split_whitespace().collect::<Vec<_>>().join(" ");
    words
        .replace("* ", "*")
        .replace("( ", "(")
        .replace("(void)", "()")
}

/// Name and signature of each function of the header; names of parameters are left out.
fn declarations() -> BTreeMap<String, String> {
    let code = header();
    let typedef = "typedef int (*kinglet_on_chunk)(const kinglet_chunk *chunk, void *user);";
    let code = code.replace(typedef, "");
    let ends = code.match_indices(");");
    let functions = ends.map(|(end, _)| {
        let start = code[..end].rfind([';', '}', '{']).map_or(0, |at| at + 1);
        let declaration = &code[start..end];
        let open = declaration.find('(').expect("a function has parameters");
        let (head, parameters) = (tidy(&declaration[..open]), tidy(&declaration[open + 1..]));
        let at = head.rfind([' ', '*']).expect("a type and a name") + 1;
        let kinds = parameters
            .split(", ")
            .filter(|p| !p.is_empty() && *p != "void")
            .map(|p| {
                let kind = p.trim_end_matches(|c: char| c.is_ascii_alphanumeric() || c == '_');
                // Enums are passed as numbers.
                kind.trim().replace("kinglet_event", "uint32_t")
            });
        let kinds = kinds.collect::<Vec<_>>().join(", ");
        let name = head[at..].to_owned();
        // `#endif` and the like before the first.
        let result = head[..at]
            .rsplit('\n')
            .next()
            .expect("a line")
            .trim()
            .to_owned();
        let result = result
            .rsplit_once("{ ")
            .map_or(result.clone(), |(_, r)| r.to_owned());
        (name, format!("{result}({kinds})"))
    });
    functions.collect()
}

/// A type of Rust as C has it.
fn in_c(kind: &str) -> String {
    let kind = kind.trim();
    if let Some(to) = kind.strip_prefix("*mut ") {
        let to = in_c(to);
        return if to.ends_with('*') {
            format!("{to}*")
        } else {
            format!("{to} *")
        };
    }
    if let Some(to) = kind.strip_prefix("*const ") {
        return format!("const {} *", in_c(to));
    }
    match kind {
        "c_char" => "char",
        "c_int" => "int",
        "c_void" => "void",
        "usize" => "size_t",
        "u64" => "uint64_t",
        "u32" => "uint32_t",
        "f32" => "float",
        "Status" => "kinglet_status",
        other => other,
    }
    .into()
}

/// The same of the functions that Rust defines.
fn definitions() -> BTreeMap<String, String> {
    let mut functions = BTreeMap::new();
    for entry in std::fs::read_dir(root().join("src/capi")).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|e| e != "rs") {
            continue;
        }
        let text = std::fs::read_to_string(path).expect("a source file");
        for (at, _) in text.match_indices("#[unsafe(no_mangle)]") {
            let rest = &text[at..];
            let start =
                rest.find("extern \"C\" fn ").expect("a function") + "extern \"C\" fn ".len();
            let rest = &rest[start..rest.find(" {\n").expect("a body")];
            let (name, rest) = rest.split_once('(').expect("parameters");
            let (parameters, result) = rest.rsplit_once(')').expect("parameters end");
            let kinds = parameters
                .split(',')
                .filter_map(|p| Some(in_c(p.split_once(':')?.1)));
            let kinds = kinds.collect::<Vec<_>>().join(", ");
            let result = result.trim().strip_prefix("->").map_or("void".into(), in_c);
            functions.insert(name.into(), format!("{result}({kinds})"));
        }
    }
    functions
}

#[test]
fn signatures_are_those_of_the_header() {
    let spaced = |functions: BTreeMap<String, String>| -> Vec<String> {
        let line = |(name, signature): (String, String)| {
            let (result, rest) = signature.split_once('(').expect("parameters");
            let by_c = ["kinglet_status_name"]; // takes the enum, as a number
            let rest = match by_c.contains(&&*name) {
                true => rest.replace("kinglet_status", "i32"),
                false => rest.to_owned(),
            };
            format!("{} {name}({}", result.trim(), rest)
        };
        functions.into_iter().map(line).collect()
    };
    let (declared, defined) = (spaced(declarations()), spaced(definitions()));
    assert!(declared.len() > 40);
    assert_eq!(declared, defined);
}

/// What programs that were compiled with an older header rely on, with pointers of 8 bytes: `tests/capi/abi.txt` may grow, but no line may change. It
/// is written anew with KINGLET_UPDATE_ABI=1.
#[cfg(target_pointer_width = "64")]
#[test]
fn the_binary_interface_is_the_one_written_down() {
    let code = header();
    let mut lines: Vec<String> = declarations()
        .into_iter()
        .map(|(name, signature)| format!("function {name} {signature}"))
        .collect();
    for body in code.split("typedef enum ").skip(1) {
        let (name, rest) = body.split_once('{').expect("an enum has a body");
        let values = rest.split_once('}').expect("it ends").0;
        for value in values.split(',').map(tidy).filter(|v| !v.is_empty()) {
            lines.push(format!("enum {} {value}", name.trim()));
        }
    }
    for (_, what, n) in layouts() {
        lines.push(format!("struct {what} {n}"));
    }
    lines.sort();
    let found = lines.join("\n") + "\n";
    let path = root().join("tests/capi/abi.txt");
    if std::env::var_os("KINGLET_UPDATE_ABI").is_some() {
        std::fs::write(&path, &found).expect("the repository can be written");
    }
    let expected = std::fs::read_to_string(&path).expect("the file is in the repository");
    assert_eq!(found, expected, "see KINGLET_UPDATE_ABI");
}

/// Without sanitizers, which keep memory and take time.
fn bounds() -> Command {
    let source = root().join("tests/capi/bounds.c");
    let mut command = Command::new(build("gcc", &["-std=c99"], &source, "bounds"));
    command.current_dir(root());
    command
}

#[test]
fn work_ends_soon_and_sessions_do_not_disturb_each_other() {
    // The bound is far above what it takes, for machines that are busy.
    print!("{}", run(bounds().args([SMALL, "24", "200", "2", "150"])));
    print!("{}", run(bounds().args([TINY, "0", "200", "8", "400"])));
}

/// 2,000 cancels, 8 times 10,000 tokens: some minutes. KINGLET_BOUND_MS is for a machine that has nothing else to do.
#[test]
#[ignore = "minutes"]
fn work_ends_soon_however_often() {
    let bound = std::env::var("KINGLET_BOUND_MS").unwrap_or("50".into());
    print!(
        "{}",
        run(bounds().args([SMALL, "2000", &bound, "8", "10000"]))
    );
}
