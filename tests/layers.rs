//! ARCHITECTURE.md draws the crate as layers. The imports in `src/` must agree with the drawing: a module imports
//! modules of lower lines only, and the files of a folder do not import each other in a circle. What only tests use
//! does not count.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The modules that the drawing names, each with its line, counted from the bottom.
fn drawing(text: &str) -> BTreeMap<String, usize> {
    let block = text
        .split_once("```layers\n")
        .and_then(|(_, rest)| rest.split_once("```"))
        .expect("a block of layers")
        .0;
    let mut layers = BTreeMap::new();
    for (height, line) in block.lines().rev().enumerate() {
        let (names, _) = line.split_once(" : ").expect("names : description");
        for name in names.split(", ") {
            let twice = layers.insert(name.to_owned(), height);
            assert!(twice.is_none(), "{name} is drawn twice");
        }
    }
    layers
}

/// A file's module: `stack::ledger::entry`, and `lib` for the root.
type Module = String;

/// One file: what it imports, as absolute paths without `crate::`, and the modules that it declares.
#[derive(Default)]
struct File {
    paths: BTreeSet<String>,
    children: BTreeSet<Module>,
}

/// The words of Rust's syntax, without comments and literals.
fn words(source: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(length) = literal(rest) {
            words.push("\"\"".to_owned());
            length
        } else if first.is_alphanumeric() || first == '_' {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
            words.push(rest[..end.unwrap_or(rest.len())].to_owned());
            end.unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            words.push("::".to_owned());
            2
        } else {
            if !first.is_whitespace() {
                words.push(first.to_string());
            }
            first.len_utf8()
        };
        rest = &rest[length..];
    }
    words
}

/// The length of the string or character that the text begins with.
fn literal(text: &str) -> Option<usize> {
    let body = text.trim_start_matches(['b', 'c']);
    let prefix = text.len() - body.len();
    if prefix > 1 {
        return None;
    }
    if let Some(raw) = body.strip_prefix('r') {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        let inner = raw[hashes..].strip_prefix('"')?;
        let end = format!("\"{}", "#".repeat(hashes));
        return Some(prefix + 1 + hashes + 1 + inner.find(&end)? + end.len());
    }
    let quote = body.chars().next().filter(|c| *c == '"' || *c == '\'')?;
    let mut escaped = false;
    for (index, c) in body.char_indices().skip(1) {
        // A lifetime is no literal.
        if quote == '\'' && index > 1 && !escaped && c != '\'' && !body[1..].starts_with('\\') {
            return None;
        }
        if !escaped && c == quote {
            return Some(prefix + index + 1);
        }
        escaped = c == '\\' && !escaped;
    }
    None
}

/// Leaves out the items that are for tests or documentation tests only.
fn without_tests(words: Vec<String>) -> Vec<String> {
    let mut kept: Vec<String> = Vec::new();
    let mut index = 0;
    while index < words.len() {
        let attribute = words[index..]
            .iter()
            .take(6)
            .map(String::as_str)
            .collect::<String>();
        if !attribute.starts_with("#[cfg(test") && !attribute.starts_with("#[cfg(doctest") {
            kept.push(words[index].clone());
            index += 1;
            continue;
        }
        // The item ends with the brace that closes it, or with a semicolon.
        let mut depth = 0;
        loop {
            match words[index].as_str() {
                "{" | "(" | "[" => depth += 1,
                "}" | ")" | "]" => depth -= 1,
                _ => {}
            }
            index += 1;
            let last = words[index - 1].as_str();
            if depth == 0 && matches!(last, "}" | ";") {
                break;
            }
        }
    }
    kept
}

/// The paths of a `use` tree, or of the one path that begins at `index`.
fn tree(words: &[String], index: &mut usize, prefix: &str, paths: &mut Vec<String>) {
    let mut path = prefix.to_owned();
    loop {
        match words.get(*index).map(String::as_str) {
            Some("{") => {
                while words[*index] != "}" {
                    *index += 1;
                    if words[*index] != "}" {
                        tree(words, index, &path, paths);
                    }
                }
                *index += 1;
                return;
            }
            Some("::") => *index += 1,
            Some(word)
                if word == "*" || word.starts_with(|c: char| c.is_alphabetic() || c == '_') =>
            {
                if word != "self" || path.is_empty() {
                    path += if path.is_empty() { "" } else { "::" };
                    path += word;
                }
                *index += 1;
                if words.get(*index).map(String::as_str) != Some("::") {
                    paths.push(path);
                    // `as NAME`
                    if words.get(*index).map(String::as_str) == Some("as") {
                        *index += 2;
                    }
                    return;
                }
            }
            _ => {
                paths.push(path);
                return;
            }
        }
    }
}

/// What a file's words say: the modules that it declares, and the paths in it that lead into this crate.
fn read(module: &str, words: &[String]) -> File {
    let join = |base: &str, name: &str| match base {
        "lib" => name.to_owned(),
        base => format!("{base}::{name}"),
    };
    let mut file = File::default();
    for at in words.windows(3).filter(|at| at[0] == "mod" && at[2] == ";") {
        file.children.insert(join(module, &at[1]));
    }
    let mut index = 0;
    while index < words.len() {
        let in_use = words[index] == "use";
        let after_path = index > 0 && words[index - 1] == "::";
        index += usize::from(in_use);
        let first = words[index].as_str();
        let is_child = file.children.contains(&join(module, first));
        let starts = matches!(first, "crate" | "super" | "self") || is_child;
        let is_path = words.get(index + 1).map(String::as_str) == Some("::");
        // `$crate`: what a macro writes into another crate is an import of that crate's.
        let is_elsewhere = first == "$" || (index > 0 && words[index - 1] == "$");
        if is_elsewhere || !in_use && (after_path || !starts || !is_path) {
            index += 1;
            continue;
        }
        let mut paths = Vec::new();
        let begin = index;
        tree(words, &mut index, "", &mut paths);
        index = index.max(begin + 1);
        for path in paths {
            let mut base = module;
            let mut rest = path.as_str();
            if let Some(path) = rest.strip_prefix("crate") {
                (base, rest) = ("lib", path.trim_start_matches("::"));
            }
            rest = rest.strip_prefix("self::").unwrap_or(rest);
            while let Some(path) = rest.strip_prefix("super") {
                base = base.rsplit_once("::").map_or("lib", |(parent, _)| parent);
                rest = path.trim_start_matches("::");
            }
            if starts
                || file
                    .children
                    .contains(&join(module, rest.split("::").next().unwrap_or(rest)))
            {
                file.paths.insert(join(base, rest));
            }
        }
    }
    file
}

/// All files of the crate but those that are for tests only.
fn sources(root: &Path) -> BTreeMap<Module, File> {
    let mut files = BTreeMap::new();
    let mut left = vec!["lib".to_owned()];
    while let Some(module) = left.pop() {
        let path = module.replace("::", "/");
        let source = fs::read_to_string(root.join(&path).with_extension("rs"))
            .or_else(|_| fs::read_to_string(root.join(&path).join("mod.rs")))
            .unwrap_or_else(|error| panic!("no file of the module {module}: {error}"));
        let file = read(&module, &without_tests(words(&source)));
        left.extend(file.children.iter().cloned());
        files.insert(module, file);
    }
    files
}

/// The file that a path leads to: that of its longest part that is a module.
fn file_of<'a>(files: &'a BTreeMap<Module, File>, path: &str) -> &'a str {
    let mut path = path;
    loop {
        if let Some((module, _)) = files.get_key_value(path) {
            return module;
        }
        path = path.rsplit_once("::").map_or("lib", |(parent, _)| parent);
    }
}

fn top(module: &str) -> &str {
    module.split("::").next().unwrap_or(module)
}

/// Everything that disagrees with the drawing.
fn faults(layers: &BTreeMap<String, usize>, files: &BTreeMap<Module, File>) -> Vec<String> {
    let mut faults = Vec::new();
    let drawn: BTreeSet<_> = layers.keys().map(String::as_str).collect();
    let there: BTreeSet<_> = files.keys().map(|module| top(module)).collect();
    for name in drawn.symmetric_difference(&there) {
        faults.push(format!(
            "{name} is drawn and not there, or the other way round"
        ));
    }
    // Between modules.
    for (module, file) in files.iter().filter(|(module, _)| *module != "lib") {
        for path in &file.paths {
            let (from, to) = (top(module), top(file_of(files, path)));
            if from != to && layers.get(from) <= layers.get(to) {
                faults.push(format!("{module} imports {path}: {to} is not below {from}"));
            }
        }
    }
    // Between the files of each: one that nothing left imports cannot be part of a circle, and so on.
    let mut left: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (module, file) in files.iter().filter(|(module, _)| *module != "lib") {
        let paths = file.paths.iter().map(|path| file_of(files, path));
        let children = file.children.iter().map(String::as_str);
        let inside = |to: &&str| top(to) == top(module) && *to != module;
        left.insert(module, paths.chain(children).filter(inside).collect());
    }
    loop {
        let before = left.len();
        let imported: BTreeSet<_> = left.values().flatten().copied().collect();
        left.retain(|module, _| imported.contains(module));
        let there: BTreeSet<_> = left.keys().copied().collect();
        left.values_mut()
            .for_each(|to| to.retain(|to| there.contains(to)));
        left.retain(|_, to| !to.is_empty());
        if left.len() == before {
            break;
        }
    }
    for (module, to) in left {
        faults.push(format!("a circle: {module} imports {to:?}"));
    }
    faults
}

fn crate_as_it_is() -> (BTreeMap<String, usize>, BTreeMap<Module, File>) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    (drawing(&text), sources(&root.join("src")))
}

#[test]
fn every_import_points_down() {
    let (layers, files) = crate_as_it_is();
    let faults = faults(&layers, &files);
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

/// What would be wrong with one more line of code in `module`.
fn planted(module: &str, line: &str) -> Vec<String> {
    let (layers, mut files) = crate_as_it_is();
    let file = files.get_mut(module).expect("a module");
    file.paths
        .extend(read(module, &without_tests(words(line))).paths);
    faults(&layers, &files)
}

#[test]
fn an_import_that_points_up_or_sideways_is_found() {
    for (module, line) in [
        ("sys::clone", "use crate::start;"),
        ("sys::clone", "fn f() { crate::stack::page() }"),
        (
            "stack::ledger::entry",
            "use crate::{sys, handle::{self, Running}};",
        ),
        ("start", "use super::{handle as other};"),
        ("mem::shared", "type Alias = super::super::stack::Stack;"),
        // Circles inside a folder: a child that uses its parent, and two that use each other.
        ("stack::record", "use super::*;"),
        ("stack::ledger::entry", "use super::lists::Ledger;"),
    ] {
        assert!(!planted(module, line).is_empty(), "{module}: {line}");
    }
}

#[test]
fn what_is_no_import_is_not_found() {
    for line in [
        "// use crate::spawn;",
        "macro_rules! m { () => { use $crate::spawn as _; $crate::spawn::f() }; }",
        "const TEXT: &str = \"use crate::spawn;\";",
        "const TEXT: &str = r#\"\" crate::spawn::spawn \"#; const QUOTE: char = '\"';",
        "#[cfg(test)] mod tests { use crate::spawn; }",
        "fn f<'a>(x: &'a str) -> std::io::Result<()> { use std::spawn; }",
        "use crate::errno::Errno;",
    ] {
        assert_eq!(planted("sys::calls", line), [""; 0], "{line}");
    }
}

/// The names of a formatted file's functions, each with its lines: to the brace, or the semicolon, at the same depth.
fn functions(source: &str) -> Vec<(&str, usize)> {
    let lines: Vec<_> = source.lines().collect();
    let begins = |line: &&str| {
        let words = line.trim_start().split(' ');
        let mut words = words.skip_while(|word| {
            word.starts_with("pub") || ["const", "unsafe", "extern", "\"C\""].contains(word)
        });
        words.next() == Some("fn")
    };
    let mut functions = Vec::new();
    for (first, line) in lines.iter().enumerate().filter(|(_, line)| begins(line)) {
        let depth = |line: &str| line.len() - line.trim_start().len();
        let closes = |other: &&str| depth(other) == depth(line) && other.ends_with(['}', ';']);
        let last = lines[first..].iter().position(closes).unwrap_or(0);
        let (_, name) = line.split_once("fn ").unwrap_or_default();
        let name = name.split(['(', '<']).next().unwrap_or(name);
        functions.push((name, last + 1));
    }
    functions
}

/// Tables are data, not functions.
#[test]
fn no_file_and_no_function_is_too_long_to_read_at_once() {
    const FILE: usize = 700;
    const FUNCTION: usize = 80;
    let mut long = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let source = fs::read_to_string(&path).expect("a file");
                let length = source.lines().count();
                if length > FILE {
                    long.push(format!("{}: {length} lines", path.display()));
                }
                let functions = functions(&source).into_iter();
                long.extend(
                    functions
                        .filter(|(_, lines)| *lines > FUNCTION)
                        .map(|(name, lines)| {
                            format!("{}: fn {name}, {lines} lines", path.display())
                        }),
                );
            }
        }
    }
    assert!(long.is_empty(), "\n{}", long.join("\n"));
}
