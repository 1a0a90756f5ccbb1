//! [`Verdict`]: a cause, how sure it is, and what else it could be.

use std::fmt;
use std::time::Duration;

use super::cause::{Cause, CauseKind, Causes, Certainty, Unknown};
use super::rule::Ruling;

/// The outcome of a diagnosis.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Verdict {
    pub(crate) cause: Cause,
    pub(crate) certainty: Certainty,
    /// What else it could be, when inferred.
    pub(crate) alternatives: Causes,
    /// Why the kernel could not be probed for what refused a clone, where that is so.
    pub(crate) silence: Option<&'static str>,
    /// Whether retrying for some milliseconds is right.
    pub(crate) transient: bool,
    /// How often the refused call was repeated.
    pub(crate) repeated: u32,
    /// The refusals that the thread's own cgroup had counted at the first and at the last reading.
    pub(crate) counted: Option<[u64; 2]>,
    pub(crate) spent: Duration,
}

impl Verdict {
    pub(crate) const UNKNOWN: Verdict = Verdict {
        cause: Cause::Unknown(Unknown::NOTHING),
        certainty: Certainty::Unknown,
        alternatives: Causes::NONE,
        silence: None,
        transient: false,
        repeated: 0,
        counted: None,
        spent: Duration::ZERO,
    };

    pub(crate) fn proven(cause: impl Into<Cause>) -> Verdict {
        Verdict {
            cause: cause.into(),
            certainty: Certainty::Proven,
            ..Verdict::UNKNOWN
        }
    }

    #[cfg(test)]
    pub(crate) fn inferred(cause: impl Into<Cause>, alternatives: Causes) -> Verdict {
        let cause = cause.into();
        Verdict {
            cause,
            certainty: Certainty::Inferred,
            alternatives: alternatives.without(cause.kind()),
            ..Verdict::UNKNOWN
        }
    }

    /// What the rule says. `cause`: the evidence of what it names.
    pub(super) fn ruled(ruling: &Ruling, cause: Option<Cause>) -> Verdict {
        Verdict {
            cause: cause.unwrap_or(Verdict::UNKNOWN.cause),
            certainty: ruling.certainty,
            alternatives: ruling.alternatives,
            ..Verdict::UNKNOWN
        }
    }

    /// Where the refused call could not be repeated, nothing is proven.
    pub(super) fn infer(&mut self) {
        if self.certainty == Certainty::Proven {
            self.certainty = Certainty::Inferred;
        }
    }

    /// With what another verdict on the same refusal leaves possible.
    #[cfg(feature = "interpose")]
    pub(super) fn or(mut self, other: Verdict) -> Verdict {
        let named = (other.certainty != Certainty::Unknown).then_some(other.cause.kind());
        let others = other.alternatives.iter().chain(named);
        self.alternatives = others
            .fold(self.alternatives, Causes::with)
            .without(self.cause.kind());
        self.spent += other.spent;
        self.transient_if(other.transient && self.certainty == Certainty::Unknown)
    }

    /// That of a later attempt of the same spawn. Where the cgroup has counted a refusal since the first reading, it may
    /// have refused an attempt that a sibling inside execve seems to have refused, and will when the sibling is gone.
    pub(crate) fn after(mut self, earlier: &Verdict) -> Verdict {
        self.counted = since(earlier.counted, self.counted);
        let risen = self.counted.is_some_and(|[first, last]| last > first);
        if risen && self.cause.kind() == CauseKind::SiblingExec {
            self.certainty = Certainty::Inferred;
            self.alternatives = self.alternatives.with(CauseKind::PidsCgroup);
        }
        self
    }

    pub(super) fn transient(self) -> Verdict {
        self.transient_if(true)
    }

    pub(super) fn transient_if(mut self, yes: bool) -> Verdict {
        self.transient |= yes;
        self
    }
}

/// A counter at the first of earlier readings and at the last of later ones.
pub(super) fn since(earlier: Option<[u64; 2]>, later: Option<[u64; 2]>) -> Option<[u64; 2]> {
    match (earlier, later) {
        (Some([first, _]), Some([_, last])) => Some([first, last]),
        _ => later.or(earlier),
    }
}

/// Several lines: the cause, how sure it is, the evidence, what to change.
impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "cause: {} ({})", self.cause, self.certainty)?;
        let also = match self.certainty {
            Certainty::Unknown => "",
            _ => "also ",
        };
        if !self.alternatives.is_empty() {
            writeln!(f, "could {also}be: {}", self.alternatives)?;
        }
        // An unknown cause has it in its line.
        if let (Certainty::Inferred, Some(why)) = (self.certainty, self.silence) {
            writeln!(f, "not proven: {why}")?;
        }
        writeln!(f, "evidence:")?;
        self.cause.report(f)?;
        f.write_str("what to change:\n  ")?;
        self.cause.remedy(f)?;
        let counts = self.alternatives.with(self.cause.kind()).has_count();
        if self.transient && self.cause.kind() != CauseKind::SiblingExec {
            f.write_str(
                "\n  Retrying for some milliseconds is right: what stood in the way may be gone already",
            )?;
            f.write_str(match counts {
                true => " (threads that have\n  ended count until the kernel has reaped them).",
                false => ".",
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::cause::{Answer, SiblingExec, ThreadsMax};
    use crate::errno::Errno;

    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/diagnose/golden.txt");

    /// Each cause with each text that it can have, and after these what a verdict adds.
    fn samples() -> Vec<Verdict> {
        let mut all: Vec<Verdict> = Cause::samples()
            .into_iter()
            .map(|cause| match cause {
                Cause::Unknown(_) => Verdict {
                    cause,
                    ..Verdict::UNKNOWN
                },
                _ => Verdict::proven(cause),
            })
            .collect();
        all.push(Verdict::UNKNOWN.transient());
        all.push(Verdict::proven(SiblingExec { threads: Some(2) }).transient());
        let (tasks, maximum) = (Some(5000), Some(5000));
        let threads_max = Cause::from(ThreadsMax { tasks, maximum });
        let user = Cause::samples()
            .into_iter()
            .find(|cause| cause.kind() == CauseKind::UserProcesses)
            .expect("a sample");
        let others = [
            CauseKind::UserProcesses,
            CauseKind::ThreadsMax,
            CauseKind::DeadlineScheduling,
        ];
        for (cause, clone3_empty, until_pid_number) in [
            (threads_max, Errno::ENOSYS, Answer::NotAsked),
            (threads_max, Errno::EPERM, Answer::NotAsked),
            (user, Errno::EINVAL, Answer::Refused(Errno::E2BIG)),
        ] {
            let mut seen = Unknown::NOTHING;
            seen.oracle.clone3_empty = Answer::Refused(clone3_empty);
            seen.oracle.until_pid_number = until_pid_number;
            all.push(Verdict {
                silence: seen.oracle.silence(),
                ..Verdict::inferred(cause, others.into_iter().collect())
            });
        }
        all
    }

    /// A sibling inside execve refuses at each look, and between two of them the cgroup, which only its counter shows.
    #[test]
    fn a_counter_that_rises_between_two_attempts_is_remembered() {
        let exec = |counted| Verdict {
            counted,
            ..Verdict::proven(SiblingExec { threads: Some(2) }).transient()
        };
        let first = exec(Some([7, 7]));
        let second = exec(Some([7, 7])).after(&first);
        assert_eq!(second.certainty, Certainty::Proven);
        for later in [exec(None), exec(Some([8, 8]))] {
            let third = exec(Some([8, 8])).after(&second);
            let last = later.after(&third);
            assert_eq!(last.certainty, Certainty::Inferred);
            assert!(last.alternatives.contains(CauseKind::PidsCgroup));
        }
    }

    /// All texts lie in a file that a reader can read. Where they changed on purpose,
    /// `NPTL_UPDATE_GOLDEN=1 cargo test --lib golden` writes it anew.
    #[test]
    fn every_text_is_that_of_the_golden_file() {
        let mut text = String::new();
        for verdict in samples() {
            let kind = verdict.cause.kind();
            text += &format!("==== {kind:?}: {kind}\n{verdict}\n\n");
        }
        for kind in CauseKind::ALL {
            assert!(
                text.contains(&format!("==== {kind:?}: ")),
                "{kind:?} has no sample"
            );
        }
        for line in text.lines() {
            assert_eq!(line, line.trim_end(), "blanks at the end");
            assert!(
                line.len() <= 126 || line.contains("xxx"),
                "{} bytes: {line}",
                line.len()
            );
        }
        if std::env::var_os("NPTL_UPDATE_GOLDEN").is_some() {
            std::fs::write(GOLDEN, &text).expect("written");
        }
        let golden = std::fs::read_to_string(GOLDEN).expect("the golden file");
        for (number, (found, wanted)) in text.lines().zip(golden.lines()).enumerate() {
            let number = number + 1;
            assert!(
                found == wanted,
                "{GOLDEN}:{number}\n-{wanted}\n+{found}\nIf that is meant: NPTL_UPDATE_GOLDEN=1 cargo test --lib golden"
            );
        }
        let (found, wanted) = (text.lines().count(), golden.lines().count());
        assert_eq!(
            found, wanted,
            "lines of {GOLDEN}: NPTL_UPDATE_GOLDEN=1 cargo test --lib golden"
        );
    }
}
