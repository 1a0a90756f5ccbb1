//! The example `vmm`: a real machine on /dev/kvm, where there is one.

use std::path::PathBuf;
use std::process::{Command, Output};
use support::{or_skip, skip};

const NO_KVM: i32 = 77;

/// cargo builds the examples of a package with its tests, and puts them beside.
fn vmm(arguments: &[&str]) -> Result<Output, String> {
    let tests = std::env::current_exe().map_err(|error| error.to_string())?;
    let target = tests.ancestors().nth(2).ok_or("no target folder")?;
    let program: PathBuf = target.join("examples/vmm");
    if !program.exists() {
        return Err(format!("{} is not built", program.display()));
    }
    let output = Command::new(program).arg("--json").args(arguments).output();
    let output = output.map_err(|error| error.to_string())?;
    if output.status.code() == Some(NO_KVM) {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    Ok(output)
}

fn report(output: &Output) -> serde_json::Value {
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {text}", output.status);
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn a_machine_boots_pauses_resumes_and_halts() {
    let output = or_skip!(vmm(&["--vcpus", "3"]));
    let report = report(&output);
    let mut serial: Vec<_> = report["serial"].as_str().unwrap().bytes().collect();
    // Each vCPU before and after the pause, in any order.
    serial[..3].sort_unstable();
    serial[3..].sort_unstable();
    assert_eq!(serial, b"ABCABC");
    assert_eq!(report["serial_before_the_gate"], "");
    for vcpu in report["vcpus"].as_array().unwrap() {
        assert!(vcpu["kicks"].as_u64() >= Some(1), "{vcpu}");
    }
}

#[test]
fn a_refused_vcpu_ends_the_machine_before_a_guest_instruction() {
    for number in 0..3_u64 {
        let output = or_skip!(vmm(&["--vcpus", "3", "--fail-at", &number.to_string()]));
        let report = report(&output);
        assert_eq!(report["step"], "clone");
        assert_eq!(report["cause"], "PidsCgroup");
        assert_eq!(report["created_before"], number);
        assert_eq!(report["cancelled"], number);
        assert_eq!(report["serial"], "");
        assert_eq!(report["tasks_left"], 1);
    }
}

/// Not a thread of the program, but the one that KVM starts for a machine: `nptl::explain` in the setup of the first vCPU.
#[test]
fn what_kvm_is_refused_ends_the_machine_with_its_explanation() {
    let output = or_skip!(vmm(&["--vcpus", "2", "--fail-at", "kvm"]));
    let report = report(&output);
    assert_eq!(report["step"], "KVM_RUN");
    assert_eq!(report["cause"], "PidsCgroup");
    assert_eq!(report["created_before"], 0);
    assert_eq!(report["serial"], "");
    assert_eq!(report["tasks_left"], 1);
}

#[test]
fn wrong_arguments_are_refused() {
    match vmm(&["--vcpus", "0"]) {
        Ok(output) => assert_eq!(output.status.code(), Some(2)),
        Err(why) => skip!("{why}"),
    }
}
