"""Fills in what the reference, Python's Jinja as the `transformers` library sets it up, renders.

python3 render.py goldens.json [DIR]     (jinja2 3.1.6; DIR holds the templates, by default that of the file)
Each case has a template, messages and options; `expected` (or `error`, true) is replaced.
"""

import datetime
import json
import pathlib
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: its body."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def refuse(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(source, case):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    now = datetime.datetime.fromtimestamp(case["now"], datetime.timezone.utc)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = now.strftime
    return environment.from_string(source).render(
        **case.get("extra", {}),
        messages=case["messages"],
        tools=case.get("tools"),
        add_generation_prompt=case["add_generation_prompt"],
        bos_token="<s>",
        eos_token="</s>",
    )


path = pathlib.Path(sys.argv[1])
folder = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else path.parent
cases = json.loads(path.read_text())
for case in cases:
    case.pop("expected", None)
    case.pop("error", None)
    try:
        case["expected"] = render((folder / case["template"]).read_text(), case)
    except Exception:
        case["error"] = True
lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
path.write_text(f"[\n{lines}\n]\n")
