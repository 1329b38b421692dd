//! Paths are paths, whatever their names hold; what is restored or backed up goes where it was asked to go, belongs to the
//! right user, and is for nobody else.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::daemon::Daemon;
use harness::shim::{Fault, Shim};
use harness::sidecar::{Sidecar, path};

use crate::synthetic::{Synthetic, log_of, record};

/// A data directory with a log of `commits` transactions.
fn synthetic(commits: i64) -> Synthetic {
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &(0..commits).map(|n| record(n, b"payload")).collect::<Vec<_>>());
    synthetic
}

/// Names in a directory, hidden ones too.
fn names(dir: &Path) -> Vec<PathBuf> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).expect("list").map(|entry| entry.expect("an entry").path()).collect();
    names.sort();
    names
}

/// Everything below a directory, and itself.
fn tree(dir: &Path) -> Vec<PathBuf> {
    let below = if dir.is_dir() { names(dir) } else { Vec::new() };
    below.iter().flat_map(|path| tree(path)).chain([dir.to_owned()]).collect()
}

/// The transaction up to which a synthetic database is in a data directory.
fn last(data: &Path) -> u64 {
    inner_universe::datadir::log::end(&log_of(data)).expect("a log").0 - 1
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|kind| kind.uid() == 0)
}

/// A command that runs the sidecar by way of another program.
fn by_way_of(sidecar: &Sidecar, program: &str, arguments: &[&OsStr]) -> Command {
    let (mut command, own) = (Command::new(program), sidecar.command());
    command.args(arguments).arg(own.get_program()).args(own.get_args());
    command.envs(own.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command
}

#[test]
fn any_name_holds_bundles_and_repositories() {
    let (small, large) = (synthetic(5), synthetic(9));
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let sidecar = Sidecar::at(&scratch.path().join("unused"));
    let run = |options: &[(&str, &Path)], verb: &[&str]| {
        let mut command = Command::new(harness::tools::inner_universe());
        command.env("INNER_UNIVERSE__ARCHIVE__STATE_DIR", sidecar.state_dir()).args(verb);
        for (name, value) in options {
            command.arg(name).arg(value);
        }
        let output = command.output().expect("run");
        assert!(output.status.success(), "{options:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let directories = [&b"site #1"[..], b"site #2", b"what?", b"100%41", b"back\\slash", b"not UTF-8 \xff"];
    for name in directories {
        let dir = scratch.path().join(OsStr::from_bytes(name));
        std::fs::create_dir(&dir).expect("create");
        // Each bundle holds its own database alone, although another one is made beside it.
        for (synthetic, end) in [(&small, 4), (&large, 8)] {
            let (bundle, restored) = (dir.join(format!("{end}.stb")), dir.join(format!("restored-{end}")));
            run(&[("--data-dir", &synthetic.path()), ("--output", &bundle)], &["backup", "create"]);
            run(&[("--data-dir", &restored), ("--input", &bundle)], &["restore"]);
            assert_eq!(last(&restored), end);
        }
        let (repository, restored) = (dir.join("repository"), dir.join("restored"));
        run(&[("--data-dir", &small.path()), ("--repository", &repository)], &["backup", "create"]);
        run(&[("--data-dir", &restored), ("--repository", &repository)], &["restore"]);
        assert_eq!(last(&restored), 4);
        let expected = ["4.stb", "8.stb", "repository", "restored", "restored-4", "restored-8"];
        assert_eq!(names(&dir), expected.map(|name| dir.join(name)), "nothing is left behind");
    }
    let mut expected = directories.map(|name| scratch.path().join(OsStr::from_bytes(name)));
    expected.sort();
    assert_eq!(names(scratch.path()), expected, "nothing is written elsewhere");
}

#[test]
fn an_address_with_a_fragment_is_refused() {
    let synthetic = synthetic(5);
    let scratch = tempfile::tempdir().expect("a temporary directory");
    for (part, said) in [(" #1/repository", "%23"), ("?1/repository", "%3F")] {
        let sidecar = Sidecar::with(&format!("file://{}/srv{part}", scratch.path().display()));
        let refused = sidecar.run(["backup", "create", "--data-dir", path(&synthetic.path())]).fails_with(2);
        assert!(refused.contains(said) && refused.contains("plain path"), "{refused}");
    }
    assert_eq!(names(scratch.path()), Vec::<PathBuf>::new());
}

#[test]
fn a_failed_bundle_leaves_nothing_behind() {
    let synthetic = synthetic(5);
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let sidecar = Sidecar::at(&scratch.path().join("unused"));
    let (data, output) = (synthetic.path(), scratch.path().join("house.stb"));
    let keys = synthetic.dir.path().join("keys");
    std::fs::create_dir(&keys).expect("create");
    let words = ["backup", "create", "--data-dir", path(&data), "--output", path(&output)];
    let run = sidecar.run(words.iter().chain(&["--key-dir", path(&keys), "--allow-plain-keys"]));
    assert!(run.fails_with(2).contains("id_ecdsa"));
    assert_eq!(names(scratch.path()), Vec::<PathBuf>::new());
}

#[test]
fn bundles_and_directories_are_for_their_owner_alone() {
    let synthetic = synthetic(5);
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let keys = synthetic.dir.path().join("keys");
    std::fs::create_dir(&keys).expect("create");
    for name in ["id_ecdsa", "id_ecdsa.pub"] {
        std::fs::write(keys.join(name), "a key").expect("write");
    }
    let (repository, bundle) = (scratch.path().join("repository"), scratch.path().join("house.stb"));
    let restored = scratch.path().join("restored");
    let sidecar = Sidecar::at(&repository);
    // With a umask that lets everybody read and write.
    let script = ["-c", "umask 000; exec \"$@\"", "sh"].map(OsStr::new);
    let run = |words: &[&str]| {
        let output = by_way_of(&sidecar, "sh", &script).args(words).output().expect("run");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let data = synthetic.path();
    let create = ["backup", "create", "--data-dir", path(&data), "--key-dir", path(&keys), "--allow-plain-keys"];
    run(&create);
    run(&[&create[..], &["--output", path(&bundle)]].concat());
    run(&["restore", "--data-dir", path(&restored)]);
    let captured = scratch.path().join("restored.keys");
    for file in tree(&repository).into_iter().chain(tree(&captured)).chain([bundle]) {
        let kind = std::fs::metadata(&file).expect("inspect");
        let expected = if kind.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(kind.permissions().mode() & 0o7777, expected, "{}", file.display());
    }
}

#[test]
fn a_restore_keeps_owner_and_mode() {
    if !is_root() {
        println!("skipped: only root gives files to others");
        return;
    }
    let synthetic = synthetic(5);
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let sidecar = Sidecar::at(&scratch.path().join("repository"));
    sidecar.backup(&synthetic.path());
    let (above, target) = (scratch.path().join("above"), scratch.path().join("above/data"));
    std::fs::create_dir_all(&target).expect("create");
    lchown(&above, Some(4711), Some(4712)).expect("chown");
    lchown(&target, Some(4713), Some(4714)).expect("chown");
    std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o750)).expect("chmod");
    let check = |dir: &Path, owner: (u32, u32), modes: (u32, u32)| {
        for file in tree(dir) {
            let kind = std::fs::metadata(&file).expect("inspect");
            assert_eq!((kind.uid(), kind.gid()), owner, "{}", file.display());
            let expected = if kind.is_dir() { modes.0 } else { modes.1 };
            assert_eq!(kind.mode() & 0o7777, expected, "{}", file.display());
        }
    };
    sidecar.restore(&target, "latest");
    check(&target, (4713, 4714), (0o750, 0o640));
    // And with something in it.
    sidecar.run(["restore", "--force", "--data-dir", path(&target)]).ok();
    check(&target, (4713, 4714), (0o750, 0o640));
    // A new one is its parent's.
    let new = above.join("new");
    sidecar.restore(&new, "latest");
    check(&new, (4711, 4712), (0o755, 0o644));
}

#[test]
fn a_link_is_followed_and_said_in_the_plan() {
    let synthetic = synthetic(5);
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let sidecar = Sidecar::at(&scratch.path().join("repository"));
    sidecar.backup(&synthetic.path());
    let (large, link) = (scratch.path().join("large"), scratch.path().join("link"));
    std::fs::create_dir_all(large.join("data/old")).expect("create");
    symlink("large/data", &link).expect("link");
    let target = std::fs::canonicalize(large.join("data")).expect("a path");
    let plan = sidecar.run(["restore", "--dry-run", "--force", "--data-dir", path(&link)]).ok();
    assert_eq!(plan["link_target"], path(&target));
    let report = sidecar.run(["restore", "--force", "--data-dir", path(&link)]).ok();
    assert_eq!(report["link_target"], path(&target));
    assert!(link.is_symlink() && last(&large.join("data")) == 4);
    let aside = PathBuf::from(report["moved_aside"].as_str().expect("moved aside"));
    assert!(aside.starts_with(target.parent().expect("a parent")) && aside.join("old").is_dir());
    assert_eq!(names(target.parent().expect("a parent")), [target.clone(), aside]);
}

#[test]
fn a_mount_point_is_refused_before_anything_is_read() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let target = scratch.path().join("data");
    std::fs::create_dir(&target).expect("create");
    // There is no repository and no bundle, so that any look at them would be seen.
    let sidecar = Sidecar::at(&scratch.path().join("missing"));
    for kind in ["mount -t tmpfs none", "mount --bind ."] {
        for more in [&["--dry-run"][..], &["--force"], &["--input", "missing.stb"]] {
            let script = format!("{kind} \"$0\" || exit 99; exec \"$@\"");
            let arguments = ["--mount", "sh", "-c", &script, path(&target)].map(OsStr::new);
            let mut command = by_way_of(&sidecar, "unshare", &arguments);
            command.args(["restore", "--data-dir", path(&target)]).args(more).current_dir(scratch.path());
            let Ok(output) = command.output() else { return println!("skipped: there is no `unshare`") };
            if matches!(output.status.code(), Some(1 | 99)) && !is_root() {
                return println!("skipped: only root mounts");
            }
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(6), "{kind} {more:?}: {stderr}");
            assert!(stderr.contains("mount point") && stderr.contains("/data/data"), "{stderr}");
        }
    }
}

#[test]
fn a_directory_that_cannot_be_synced_is_moved_back() {
    let synthetic = synthetic(5);
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let Some(shim) = Shim::new(scratch.path(), 7) else {
        println!("skipped: there is no C compiler");
        return;
    };
    let place = scratch.path().join("place");
    let target = place.join("data");
    std::fs::create_dir_all(target.join("old")).expect("create");
    let mut environment = shim.environment(scratch.path());
    environment.push(("FAULTY_ENDING".into(), "/place".into()));
    let sidecar = Sidecar::at(&scratch.path().join("repository")).with_environment(environment);
    sidecar.backup(&synthetic.path());
    shim.set(Fault::Sync, 1000);
    let failed = sidecar.run(["restore", "--force", "--data-dir", path(&target)]);
    assert_eq!(failed.code, 1, "{}", failed.stderr);
    assert!(failed.stderr.contains("sync") && shim.faults() > 0, "{}", failed.stderr);
    assert_eq!(tree(&place), [target.join("old"), target.clone(), place.clone()]);
    shim.calm();
    sidecar.run(["restore", "--force", "--data-dir", path(&target)]).ok();
    assert_eq!(last(&target), 4);
}

#[test]
fn one_data_directory_has_one_daemon_whatever_its_name() {
    let synthetic = synthetic(5);
    let data = synthetic.path();
    let link = synthetic.dir.path().join("link");
    symlink("data", &link).expect("link");
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let mut daemon = Daemon::start(&sidecar, &link, &[], &[]);
    daemon.wait("the archive", |status| status.databases.iter().any(|found| found.archived_offset.is_some()));
    for name in [path(&data).to_owned(), format!("{}/", path(&data)), format!("{}/../data", path(&data))] {
        // The daemon holds the lease, and makes the restore point.
        sidecar.backup(Path::new(&name));
        sidecar.run(["status", "--ready", "--data-dir", &name]).ok();
    }
    let states = std::fs::read_dir(sidecar.state_dir()).expect("list").flatten();
    assert_eq!(states.filter(|entry| entry.file_name().to_string_lossy().starts_with("data-")).count(), 1);
    daemon.stop();
}
