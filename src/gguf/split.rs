//! Names and keys of split files: `model-00002-of-00005.gguf`.

use std::path::{Path, PathBuf};

use super::metadata::Metadata;
use crate::{Error, Result};

/// Parts that a model may have.
pub(crate) const MAX_PARTS: usize = 1024;

pub(crate) const NO: &str = "split.no";
pub(crate) const COUNT: &str = "split.count";
pub(crate) const TENSORS: &str = "split.tensors.count";

/// The name of a part, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PartName<'a> {
    pub prefix: &'a str,
    /// From 1.
    pub no: usize,
    pub count: usize,
}

impl<'a> PartName<'a> {
    /// The parts of the name of `path`; `None` if it is no name of a part.
    pub fn of(path: &'a Path) -> Option<Self> {
        fn number(digits: &str) -> Option<usize> {
            let all_digits = digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit());
            all_digits.then(|| digits.parse().ok())?
        }
        let (rest, count) = path
            .file_name()?
            .to_str()?
            .strip_suffix(".gguf")?
            .rsplit_once("-of-")?;
        let (prefix, no) = rest.rsplit_once('-')?;
        Some(Self {
            prefix,
            no: number(no)?,
            count: number(count)?,
        })
    }
}

/// The path of part `no` (from 1) of `count`, beside `sibling`.
pub(crate) fn part_path(sibling: &Path, prefix: &str, no: usize, count: usize) -> PathBuf {
    sibling.with_file_name(format!("{prefix}-{no:05}-of-{count:05}.gguf"))
}

/// The split keys of one part.
pub(crate) struct Keys {
    /// From 0.
    pub no: usize,
    pub count: usize,
    /// Tensors of all parts together.
    pub n_tensors: Option<usize>,
}

impl Keys {
    /// The keys in `metadata`; `None` if the file is no part of several.
    pub fn of(metadata: &Metadata) -> Result<Option<Self>> {
        let Some(count) = metadata.opt_usize(COUNT)? else {
            return Ok(None);
        };
        if count <= 1 {
            return Ok(None);
        }
        if count > MAX_PARTS {
            return Err(Error::BadModel(format!(
                "metadata key `{COUNT}`: expected at most {MAX_PARTS}, found {count}"
            )));
        }
        Ok(Some(Self {
            no: metadata.usize(NO)?,
            count,
            n_tensors: metadata.opt_usize(TENSORS)?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts() {
        let name = PartName::of(Path::new("/x/a-b-00002-of-00010.gguf")).unwrap();
        let expected = PartName {
            prefix: "a-b",
            no: 2,
            count: 10,
        };
        assert_eq!(name, expected);
        assert_eq!(
            part_path(Path::new("/x/any"), name.prefix, 3, name.count),
            Path::new("/x/a-b-00003-of-00010.gguf")
        );
        for other in [
            "a.gguf",
            "a-00001-of-2.gguf",
            "a-00001-of-00002.bin",
            "00001-of-00002.gguf",
            "a-+0001-of-00002.gguf",
            "",
        ] {
            assert_eq!(PartName::of(Path::new(other)), None, "{other}");
        }
    }
}
