//! The commands of a page of documentation: its `sh` blocks, in order.

use std::path::{Path, PathBuf};

pub struct Page {
    pub name: String,
    pub text: String,
}

impl Page {
    /// # Panics
    /// When there is none of that name.
    pub fn read(name: &str) -> Self {
        let path = root().join(name);
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { name: name.to_owned(), text }
    }

    /// Every page of the runbooks.
    pub fn runbooks() -> Vec<Self> {
        let files = std::fs::read_dir(root().join("runbooks")).expect("the runbooks").flatten();
        let mut names: Vec<_> = files.map(|file| format!("runbooks/{}", file.file_name().to_string_lossy())).collect();
        names.sort();
        names.iter().map(|name| Self::read(name)).collect()
    }

    /// The headings of level two.
    pub fn sections(&self) -> Vec<&str> {
        self.text.lines().filter_map(|line| line.strip_prefix("## ")).collect()
    }

    /// The blocks of a section; of all, where none is named.
    pub fn blocks(&self, section: Option<&str>) -> Vec<String> {
        let mut blocks = Vec::new();
        let (mut here, mut open): (bool, Option<String>) = (section.is_none(), None);
        for line in self.text.lines() {
            match (&mut open, line.trim_end()) {
                (Some(_), "```") => blocks.extend(open.take().filter(|_| here)),
                (Some(block), line) => *block += &format!("{line}\n"),
                (None, "```sh") => open = Some(String::new()),
                (None, line) => {
                    if let (Some(title), Some(wanted)) = (line.strip_prefix("## "), section) {
                        here = title == wanted;
                    }
                }
            }
        }
        blocks
    }

    /// All commands as one script. A line that ends in `# yours` sets a variable which the operator has to choose: its value is taken from
    /// `values`.
    ///
    /// # Panics
    /// When a value is missing, or not asked for.
    pub fn script(&self, section: Option<&str>, values: &[(&str, &str)]) -> String {
        let mut asked = Vec::new();
        let mut script = String::new();
        for block in self.blocks(section) {
            for line in block.lines() {
                match line.trim_end().strip_suffix("# yours").and_then(|line| line.split_once('=')) {
                    Some((name, _)) => {
                        let value = values.iter().find(|(known, _)| *known == name);
                        let (_, value) = value.unwrap_or_else(|| panic!("{}: no value for {name}", self.name));
                        script += &format!("{name}='{value}'\n");
                        asked.push(name.to_owned());
                    }
                    None => script += &format!("{line}\n"),
                }
            }
        }
        for (name, _) in values {
            assert!(asked.iter().any(|asked| asked == name), "{} does not ask for {name}", self.name);
        }
        script
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}
