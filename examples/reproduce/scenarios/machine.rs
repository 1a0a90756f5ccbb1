//! Limits of the whole machine: changed for the milliseconds of the questions, and put back by a guardian.

use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nptl::diagnose::CauseKind;
use nptl::{Cause, Certainty, Step, diagnose};

use super::ask::{Asker, Expected, Right, other_cause, reports, same, tell_note};
use super::guardian::GuardedFile;
use super::memory::kilobytes;
use super::{Need, Scenario, plain};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "threads-max",
        what: "the machine has as many tasks as kernel.threads-max allows",
        needs: &[Need::MachineWide, Need::Root],
        sandbox: plain,
        provoke: threads_max,
    },
    Scenario {
        name: "overcommit-2",
        what: "the stack exceeds what strict overcommit (mode 2) leaves",
        needs: &[Need::MachineWide, Need::Root],
        sandbox: plain,
        provoke: overcommit_2,
    },
];

const PROVEN: &[Certainty] = &[Certainty::Proven];

/// The guardian puts the value back at the latest then.
const LONGEST: Duration = Duration::from_secs(2);

/// No process of the machine can create a task meanwhile: the questions take a millisecond or two.
fn threads_max(ask: &mut Asker<'_>) -> Result<(), String> {
    /// The kernel takes no less.
    const LEAST: u64 = 20;
    /// As many may end before the questions are asked.
    const ENDING: u64 = 8;
    ask.calibrate()?;
    let tasks = tasks()?;
    let most = tasks.saturating_sub(ENDING).max(LEAST);
    let path = Path::new("/proc/sys/kernel/threads-max");
    let guarded = GuardedFile::change(path, &most.to_string(), LONGEST)?;
    let began = std::time::Instant::now();
    ask.ask();
    drop(guarded);
    let lasted = began.elapsed();
    tell_note(format_args!(
        "kernel.threads-max was {most} for {lasted:.1?}, with {tasks} tasks in the machine"
    ));
    ask.tell(Right::Refused, |error| {
        let expected = Expected {
            step: Step::Clone,
            errno: Errno::EAGAIN,
            kind: CauseKind::ThreadsMax,
            certainty: PROVEN,
        };
        expected.judge(error, |cause| match *cause {
            Cause::ThreadsMax(diagnose::ThreadsMax { tasks, maximum, .. }) => {
                same("kernel.threads-max", maximum, Some(most))?;
                same("as many tasks as that", tasks >= Some(most), true)
            }
            ref other => other_cause(other),
        })?;
        reports(
            error,
            &[
                &format_args!("/proc/sys/kernel/threads-max: {most}\n"),
                &"/proc/loadavg, tasks of all users: ",
                &"sysctl kernel.threads-max=N",
            ],
        )
    });
    Ok(())
}

/// The fourth field of /proc/loadavg is `running/all`.
fn tasks() -> Result<u64, String> {
    let text = std::fs::read_to_string("/proc/loadavg").map_err(|e| e.to_string())?;
    let field = text.split_whitespace().nth(3);
    let all = field.and_then(|field| field.split_once('/')?.1.parse().ok());
    all.ok_or_else(|| format!("/proc/loadavg: {text:?}"))
}

/// Others are refused memory meanwhile only if they want nearly as much as this scenario.
fn overcommit_2(ask: &mut Asker<'_>) -> Result<(), String> {
    const MARGIN: u64 = 1 << 30;
    ask.calibrate()?;
    let meminfo = |field| kilobytes("/proc/meminfo", field);
    let limit = meminfo("CommitLimit")?;
    let committed = meminfo("Committed_AS")?;
    let total = meminfo("MemTotal")? + meminfo("SwapTotal")?;
    let left = limit.saturating_sub(committed);
    if left < 2 * MARGIN {
        return Err(format!(
            "{committed} of {limit} bytes are committed: others would be refused memory"
        ));
    }
    // More than is left, and not so much that the other modes would refuse it.
    let stack = left + MARGIN;
    if stack >= total {
        return Err("no size is refused by mode 2 alone here".to_owned());
    }
    ask.stack_size(stack as usize);
    let path = Path::new("/proc/sys/vm/overcommit_memory");
    let guarded = GuardedFile::change(path, "2", LONGEST)?;
    ask.ask();
    drop(guarded);
    ask.tell(Right::Refused, |error| {
        let expected = Expected {
            step: Step::MapStack,
            errno: Errno::ENOMEM,
            kind: CauseKind::Overcommit,
            certainty: PROVEN,
        };
        expected.judge(error, |cause| match *cause {
            Cause::Overcommit(diagnose::Overcommit {
                mode,
                requested,
                in_use,
                limit: found,
                ..
            }) => {
                same("the mode", mode, Some(2))?;
                same("CommitLimit", found, Some(limit))?;
                same("the size", requested >= stack, true)?;
                let in_use = in_use.ok_or("Committed_AS was not read")?;
                same("the sum beyond the limit", in_use + requested > limit, true)
            }
            ref other => other_cause(other),
        })?;
        reports(
            error,
            &[
                &"/proc/sys/vm/overcommit_memory: 2\n",
                &format_args!("/proc/meminfo, CommitLimit: {limit} bytes ("),
                &"sysctl vm.overcommit_ratio=PERCENT",
            ],
        )
    });
    Ok(())
}
