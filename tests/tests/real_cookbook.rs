//! The recipes of docs/cookbook.md, run in their order against the real server: what they print is what the page shows.

#![expect(clippy::unwrap_used, reason = "a test may stop at anything unexpected")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use bellwire_tests::real::{Site, binary};
use rustix::process::{Pid, Signal, kill_process_group};

/// Stands for whatever differs from run to run, within a line.
const ANYTHING: char = '…';

/// Ends what one block printed.
const END: &str = "--- end of the block ---";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Language {
    Shell,
    Python,
}

/// One block to run, and what the page shows of what it prints.
#[derive(Debug)]
struct Recipe {
    language: Language,
    code: String,
    shown: String,
    /// Where it begins on the page.
    line: usize,
}

/// The recipes of a page: blocks in a language that runs, each with the block of text right after it, if there is one.
fn recipes(page: &str) -> Vec<Recipe> {
    let mut found: Vec<Recipe> = Vec::new();
    let mut lines = page.lines().enumerate();
    // Only a block that follows without a word between shows what the one before prints.
    let mut shows_the_last = false;
    while let Some((at, line)) = lines.next() {
        let Some(language) = line.strip_prefix("```") else {
            shows_the_last &= line.is_empty();
            continue;
        };
        let mut body = String::new();
        loop {
            let (_, line) = lines
                .next()
                .unwrap_or_else(|| panic!("the block of line {} has no end", at + 1));
            if line == "```" {
                break;
            }
            body.push_str(line);
            body.push('\n');
        }
        let language = match language {
            "sh" => Language::Shell,
            "python" => Language::Python,
            "text" if shows_the_last => {
                found.last_mut().unwrap().shown = body;
                shows_the_last = false;
                continue;
            }
            other => panic!("line {}: nobody runs a block of `{other}` here", at + 1),
        };
        found.push(Recipe {
            language,
            code: body,
            shown: String::new(),
            line: at + 1,
        });
        shows_the_last = true;
    }
    found
}

/// Whether this line is what the page shows; the wildcard stands for one character or more.
fn fits(shown: &str, line: &str) -> bool {
    let mut pieces = shown.split(ANYTHING);
    let Some(mut rest) = line.strip_prefix(pieces.next().unwrap_or_default()) else {
        return false;
    };
    let mut pieces = pieces.peekable();
    while let Some(piece) = pieces.next() {
        if pieces.peek().is_none() {
            return rest.len() > piece.len() && rest.ends_with(piece);
        }
        let skipped = rest.chars().next().map_or(0, char::len_utf8);
        let Some(at) = rest.get(skipped..).and_then(|rest| rest.find(piece)) else {
            return false;
        };
        rest = &rest[skipped + at + piece.len()..];
    }
    rest.is_empty()
}

/// An interpreter that runs block after block and keeps what they define.
struct Interpreter {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    errors: PathBuf,
}

impl Interpreter {
    fn start(mut command: Command, folder: &Path, name: &str) -> Interpreter {
        let errors = folder.join(format!("{name}.err"));
        for (variable, _) in std::env::vars_os() {
            let lower = variable.to_string_lossy().to_lowercase();
            if lower.starts_with("bellwire") || lower.ends_with("_proxy") {
                command.env_remove(variable);
            }
        }
        let binaries = binary("bellwire-device").parent().unwrap().to_owned();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let paths = std::iter::once(binaries).chain(std::env::split_paths(&path));
        let mut child = command
            .current_dir(folder)
            .env("PATH", std::env::join_paths(paths).unwrap())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&errors).unwrap())
            // What a block leaves behind in the background ends with it.
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Interpreter {
            child,
            input,
            output,
            errors,
        }
    }

    /// Runs a file and answers what it printed; with an error if it broke off.
    fn run(&mut self, line: &str) -> Result<String, String> {
        let mut said = String::new();
        let mut ended = self.input.write_all(line.as_bytes()).is_err();
        while !ended {
            let before = said.len();
            ended = self.output.read_line(&mut said).map_or(true, |n| n == 0);
            if said[before..].trim_end() == END {
                said.truncate(before);
                return Ok(said);
            }
        }
        let _rest = self.output.read_to_string(&mut said);
        let errors = fs::read_to_string(&self.errors).unwrap_or_default();
        Err(format!("{said}\n{errors}"))
    }
}

impl Drop for Interpreter {
    fn drop(&mut self) {
        let group = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(group) = group {
            let _gone = kill_process_group(group, Signal::KILL);
        }
        let _ended = self.child.wait();
    }
}

/// Runs files whose names it is told, in one set of variables.
const PYTHON: &str = "\
import sys
names = {'__name__': 'cookbook'}
for line in sys.stdin:
    path, end = line.rstrip('\\n').split('\\t')
    with open(path) as block:
        exec(compile(block.read(), path, 'exec'), names)
    print(end, flush=True)
";

#[test]
fn every_recipe_of_the_cookbook_does_what_it_shows() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cookbook.md");
    let recipes = recipes(&fs::read_to_string(page).unwrap());
    for language in [Language::Shell, Language::Python] {
        assert!(recipes.iter().any(|recipe| recipe.language == language));
    }

    let site = Site::new();
    let data = site.dir().join("bellwire-data");
    // Slow enough that one recipe meets 429 and has to wait as it says.
    let site = site
        .with_data(data)
        .with("LIMITS__PINGS_PER_SECOND", "50")
        .with("LIMITS__PING_BURST", "100")
        .with("CALLBACKS__ALLOW", "127.0.0.1:*")
        .with("CALLBACKS__PLAIN_HTTP", "true");
    let server = site.start();
    let listen = server.listen();
    let addresses = [
        ("127.0.0.1:4433", listen.devices),
        ("127.0.0.1:8480", listen.api),
        ("127.0.0.1:8490", listen.operations),
    ];

    let mut bash = Command::new("bash");
    bash.arg("-s");
    let mut shell = Interpreter::start(bash, site.dir(), "bash");
    let interpreter = std::env::var_os("BELLWIRE_TEST_PYTHON").unwrap_or("python3".into());
    let mut command = Command::new(interpreter);
    command.args(["-c", PYTHON]);
    let mut python = Interpreter::start(command, site.dir(), "python");
    shell
        .run(&format!("set -euo pipefail; echo '{END}'\n"))
        .unwrap();

    for recipe in &recipes {
        let mut code = recipe.code.clone();
        for (usual, here) in addresses {
            code = code.replace(usual, &here.to_string());
        }
        let file = site.dir().join(format!("block-{}", recipe.line));
        fs::write(&file, code).unwrap();
        let said = match recipe.language {
            Language::Shell => shell.run(&format!(". {}; echo; echo '{END}'\n", file.display())),
            Language::Python => python.run(&format!("{}\t{END}\n", file.display())),
        };
        let said = said.unwrap_or_else(|said| {
            panic!(
                "docs/cookbook.md:{}: it broke off:\n{said}\n{}",
                recipe.line,
                server.log()
            )
        });
        let (said, shown) = (said.trim_end(), recipe.shown.trim_end());
        let same = said.lines().count() == shown.lines().count()
            && shown
                .lines()
                .zip(said.lines())
                .all(|(shown, said)| fits(shown, said));
        assert!(
            same,
            "docs/cookbook.md:{}: the page shows\n{shown}\nand it prints\n{said}",
            recipe.line
        );
    }
}

#[test]
fn blocks_are_found_with_what_they_show() {
    let page = "words\n```sh\none\n```\n\n```text\n1\n```\nwords\n```python\ntwo\nthree\n```\n";
    let found = recipes(page);
    assert_eq!(found.len(), 2);
    assert_eq!(
        (
            found[0].language,
            &*found[0].code,
            &*found[0].shown,
            found[0].line
        ),
        (Language::Shell, "one\n", "1\n", 2)
    );
    assert_eq!(
        (
            found[1].language,
            &*found[1].code,
            &*found[1].shown,
            found[1].line
        ),
        (Language::Python, "two\nthree\n", "", 10)
    );
}

#[test]
#[should_panic(expected = "line 5: nobody runs a block of `text` here")]
fn a_block_of_text_that_belongs_to_no_recipe_is_found() {
    recipes("```sh\none\n```\nwords\n```text\n1\n```\n");
}

#[test]
fn what_differs_each_time_is_left_out_and_nothing_else() {
    for (shown, line, same) in [
        ("a", "a", true),
        ("a", "b", false),
        ("a…", "abc", true),
        ("a…", "a", false),
        ("…c", "abc", true),
        ("a…c…e", "abcde", true),
        ("a…c…e", "abcd", false),
        ("{\"id\":\"…\",\"n\":1}", "{\"id\":\"x\",\"n\":1}", true),
        ("{\"id\":\"…\",\"n\":1}", "{\"id\":\"x\",\"n\":2}", false),
        ("{\"id\":\"…\",\"n\":1}", "{\"id\":\"\",\"n\":1}", false),
        ("", "", true),
        ("", "x", false),
    ] {
        assert_eq!(fits(shown, line), same, "{shown} against {line}");
    }
}
