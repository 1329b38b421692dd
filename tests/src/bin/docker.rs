//! What stands in for `docker` where there is no engine: as much of it as the runbooks use, on compose.yaml of the working directory.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros, reason = "a program of the tests prints")]

use std::process::ExitCode;

use harness::compose::{Overrides, Project};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match docker(&words) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("docker: {error}");
            ExitCode::FAILURE
        }
    }
}

fn docker(words: &[String]) -> Result<i32, String> {
    match words.split_first() {
        Some((verb, rest)) if verb == "compose" => compose(rest),
        // Images are programs of this machine.
        Some((verb, _)) if verb == "build" => Ok(0),
        Some((verb, rest)) if verb == "run" => run(rest),
        _ => Err(format!("{words:?} is nothing that the stand-in knows")),
    }
}

/// `docker run --rm [--user U] [--volume A:B] IMAGE COMMAND...`: an image of ours, run as it is.
fn run(words: &[String]) -> Result<i32, String> {
    let mut options = Options::leading(words, &["--user", "--volume", "--entrypoint"]);
    let image = options.rest.first().cloned().ok_or("an image")?;
    let service = if image.starts_with("inner-universe-operator:") { "deploy" } else { "sidecar" };
    let dir = std::env::current_dir().map_err(|error| error.to_string())?;
    // Nothing is set yet that compose.yaml asks for.
    let project = Project::open(&dir, &[], false)?;
    let overrides = Overrides {
        entrypoint: Some("/usr/local/bin/inner-universe".into()),
        command: Some(options.rest.split_off(1)),
        volumes: options.all("--volume"),
        user: options.all("--user").pop(),
        no_deps: true,
        bare: true,
    };
    project.run(service, &overrides)
}

fn compose(words: &[String]) -> Result<i32, String> {
    let mut outer = Options::leading(words, &["--profile"]);
    let verb = outer.rest.first().cloned().ok_or("a command")?;
    let rest = outer.rest.split_off(1);
    if verb == "version" {
        println!("a stand-in");
        return Ok(0);
    }
    let dir = std::env::current_dir().map_err(|error| error.to_string())?;
    let project = Project::open(&dir, &outer.all("--profile"), true)?;
    match verb.as_str() {
        "up" => {
            let options = Options::anywhere(&rest, &["--scale", "--timeout"]);
            let none = options
                .all("--scale")
                .iter()
                .filter_map(|scale| scale.strip_suffix("=0"))
                .map(Into::into)
                .collect::<Vec<_>>();
            if options.has("--force-recreate") {
                project.stop(&options.rest)?;
            }
            project.up(&options.rest, options.has("--wait"), &none).map(|()| 0)
        }
        "start" => project.up(&Options::anywhere(&rest, &[]).rest, true, &[]).map(|()| 0),
        "stop" => project.stop(&Options::anywhere(&rest, &["--timeout"]).rest).map(|()| 0),
        "restart" => {
            let services = Options::anywhere(&rest, &["--timeout"]).rest;
            project.stop(&services)?;
            project.up(&services, true, &[]).map(|()| 0)
        }
        "kill" => {
            let options = Options::anywhere(&rest, &["--signal"]);
            let signal = options.all("--signal").pop().unwrap_or("KILL".into());
            project.kill(&options.rest, signal.trim_start_matches("SIG")).map(|()| 0)
        }
        "exec" => {
            let options = Options::leading(&rest, &["--user", "--env"]);
            let (service, command) = options.rest.split_first().ok_or("a service")?;
            project.exec(service, command)
        }
        "run" => {
            let mut options = Options::leading(&rest, &["--entrypoint", "--volume", "--env", "--user"]);
            let service = options.rest.first().cloned().ok_or("a service")?;
            let command = options.rest.split_off(1);
            let overrides = Overrides {
                entrypoint: options.all("--entrypoint").pop(),
                command: (!command.is_empty()).then_some(command),
                volumes: options.all("--volume"),
                user: options.all("--user").pop(),
                no_deps: options.has("--no-deps"),
                bare: false,
            };
            project.run(&service, &overrides)
        }
        "ps" => {
            for (name, running) in project.list() {
                println!("{name:<16} {}", if running { "running" } else { "exited" });
            }
            Ok(0)
        }
        "logs" => {
            for service in Options::anywhere(&rest, &["--tail", "--since"]).rest {
                print!("{}", project.log(&service));
            }
            Ok(0)
        }
        "config" => {
            println!("{:#}", project.document.root());
            Ok(0)
        }
        "build" | "pull" => Ok(0),
        "cp" => match rest.as_slice() {
            [from, to] => project.copy(from, to).map(|()| 0),
            _ => Err("cp SERVICE:PATH PATH".into()),
        },
        "down" => project.down(Options::anywhere(&rest, &["--timeout"]).has("--volumes")).map(|()| 0),
        _ => Err(format!("{verb} is nothing that the stand-in knows")),
    }
}

/// Flags with their values, and the other words.
#[derive(Default)]
struct Options {
    flags: Vec<(String, Option<String>)>,
    rest: Vec<String>,
}

impl Options {
    /// Flags up to the first other word: what follows is a command with flags of its own.
    fn leading(words: &[String], with_value: &[&str]) -> Self {
        let mut options = Self::default();
        let mut words = words.iter().cloned().peekable();
        while let Some(word) = words.next_if(|word| word.starts_with('-')) {
            options.flag(word, &mut words, with_value);
        }
        options.rest = words.collect();
        options
    }

    /// Flags wherever they are.
    fn anywhere(words: &[String], with_value: &[&str]) -> Self {
        let mut options = Self::default();
        let mut words = words.iter().cloned();
        while let Some(word) = words.next() {
            match word.starts_with('-') {
                true => options.flag(word, &mut words, with_value),
                false => options.rest.push(word),
            }
        }
        options
    }

    fn flag(&mut self, word: String, rest: &mut dyn Iterator<Item = String>, with_value: &[&str]) {
        let flag = match word.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None if with_value.contains(&word.as_str()) => (word, rest.next()),
            None => (word, None),
        };
        self.flags.push(flag);
    }

    fn has(&self, name: &str) -> bool {
        self.flags.iter().any(|(flag, _)| flag == name)
    }

    fn all(&self, name: &str) -> Vec<String> {
        self.flags.iter().filter(|(flag, _)| flag == name).filter_map(|(_, value)| value.clone()).collect()
    }
}
