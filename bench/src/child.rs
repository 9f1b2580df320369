//! Parts of a workload that run as processes of their own, so that their memory and time are their own. A child is this
//! program with a hidden subcommand; it is given its job as JSON and says what it has to say in lines of JSON.

use std::fmt::Display;
use std::io::Write as _;
use std::process::Stdio;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{ChildStdout, Command};
use tokio::time::timeout;

use crate::failure::{During, Failure, Outcome};

/// How long a child may take to end after its input has.
const STOP_MAX: Duration = Duration::from_secs(10);

/// A child that runs. Dropping it kills it.
pub(crate) struct Child {
    child: tokio::process::Child,
    lines: Lines<BufReader<ChildStdout>>,
    name: &'static str,
}

impl Child {
    /// Starts this program with a hidden subcommand that takes its job as the only argument. It inherits standard error.
    pub(crate) fn start(name: &'static str, job: &impl Serialize) -> Outcome<Child> {
        let program = std::env::current_exe().during("find this program's own path")?;
        let job = serde_json::to_string(job).during("write down a job")?;
        let mut child = Command::new(program)
            .args([name, &job])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .during(format_args!("start {name}"))?;
        let output = child
            .stdout
            .take()
            .ok_or_else(|| Failure::new(format!("{name} has no output")))?;
        Ok(Child {
            child,
            lines: BufReader::new(output).lines(),
            name,
        })
    }

    pub(crate) fn pid(&self) -> Outcome<u32> {
        self.child
            .id()
            .ok_or_else(|| self.failure("ended early; what it said stands above"))
    }

    /// The next thing it says.
    pub(crate) async fn hear<T: DeserializeOwned>(&mut self, at_most: Duration) -> Outcome<T> {
        let line = timeout(at_most, self.lines.next_line())
            .await
            .map_err(|_| self.failure(format_args!("said nothing for {} s", at_most.as_secs())))?
            .during(format_args!("hear of {}", self.name))?
            .ok_or_else(|| self.failure("ended early; what it said stands above"))?;
        serde_json::from_str(&line).during(format_args!("understand {}", self.name))
    }

    /// Says something to it, in one line.
    pub(crate) async fn tell(&mut self, line: &str) -> Outcome<()> {
        let input = self.child.stdin.as_mut();
        let input = input.ok_or_else(|| Failure::new(format!("{} has no input", self.name)))?;
        input
            .write_all(format!("{line}\n").as_bytes())
            .await
            .during(format_args!("speak to {}", self.name))
    }

    /// Ends its input and waits for it, for some seconds; then kills it.
    pub(crate) async fn stop(mut self) {
        drop(self.child.stdin.take());
        if timeout(STOP_MAX, self.child.wait()).await.is_err() {
            // Dropping would kill it as well; here it is waited for.
            let _ = self.child.kill().await;
        }
    }

    fn failure(&self, what: impl Display) -> Failure {
        Failure::new(format!("{} {what}", self.name))
    }
}

/// The child's side: says something to the parent.
pub(crate) fn say(what: &impl Serialize) -> Outcome<()> {
    let mut line = serde_json::to_string(what).during("tell the parent")?;
    line.push('\n');
    let mut output = std::io::stdout().lock();
    output
        .write_all(line.as_bytes())
        .and_then(|()| output.flush())
        .during("tell the parent")
}

/// The child's side: what it is asked to do.
pub(crate) fn job<T: DeserializeOwned>(text: &str) -> Outcome<T> {
    serde_json::from_str(text).during("understand the job")
}

/// The child's side: waits for a line from the parent. Blocks the thread, so it is for the program's main one, which does
/// none of the runtime's work.
pub(crate) fn heard() -> Outcome<()> {
    let mut line = String::new();
    let read = std::io::stdin()
        .read_line(&mut line)
        .during("hear the parent")?;
    match read {
        0 => Err(Failure::new("the parent is gone")),
        _ => Ok(()),
    }
}
