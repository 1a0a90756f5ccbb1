//! The rule: how sure a cause may be called (A6).
//!
//! Each check that can have refused a call has a [`Standing`], found from what was read and probed. The rule turns
//! the standings into a name and a certainty. Nothing else in this folder calls a cause proven.

use super::cause::{CauseKind, Causes, Certainty};

/// What is known of one check and one refused call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Standing {
    /// It cannot have refused.
    Excluded,
    /// It can have refused, but hardly ever does: listed, and never named.
    Remote,
    /// It can have refused.
    Open,
    /// A sign points to it.
    Signed,
    /// There is evidence about the refused call that only this check leaves: a counter of refusals that rose, a
    /// maximum that was reached before and after a repetition that was refused, a probe that only this check refuses.
    Shown,
}

impl Standing {
    /// That of a check which a probe passes now: it may be full at one moment and not at the next.
    pub(super) fn passed(self) -> Standing {
        self.min(Standing::Open)
    }

    pub(super) fn shown_if(shown: bool) -> Standing {
        match shown {
            true => Standing::Shown,
            false => Standing::Excluded,
        }
    }

    pub(super) fn open_if(open: bool) -> Standing {
        match open {
            true => Standing::Open,
            false => Standing::Excluded,
        }
    }
}

/// What the rule says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ruling {
    pub(super) named: Option<CauseKind>,
    pub(super) certainty: Certainty,
    /// What else it can be.
    pub(super) alternatives: Causes,
}

impl Ruling {
    /// Everything that can have refused.
    pub(super) fn possible(&self) -> Causes {
        let named = self.named.into_iter();
        named.fold(self.alternatives, Causes::with)
    }
}

/// Rules on checks in the order in which they are made. `repeated`: the refused call was made again between the
/// readings, and refused with the same errno. Without that the evidence is about another moment than the refusal.
pub(super) fn rule(checks: &[(CauseKind, Standing)], repeated: bool) -> Ruling {
    let possible = || {
        let checks = checks.iter();
        checks.filter(|(_, standing)| *standing > Standing::Excluded)
    };
    let all: Causes = possible().map(|(kind, _)| *kind).collect();
    let best = possible().map(|(_, standing)| *standing).max();
    let mut first = possible().filter(|(_, standing)| Some(*standing) == best);
    let named = first.next().map(|(kind, _)| *kind);
    // Of several that may have refused without any sign, none is named.
    let is_named = match best {
        Some(Standing::Shown | Standing::Signed) => true,
        Some(Standing::Open) => first.next().is_none(),
        _ => false,
    };
    if !is_named {
        return Ruling {
            named: None,
            certainty: Certainty::Unknown,
            alternatives: all,
        };
    }
    // What is checked later cannot have come before it.
    let nothing_before = possible().next().map(|(kind, _)| *kind) == named;
    match best == Some(Standing::Shown) && nothing_before && repeated {
        true => Ruling {
            named,
            certainty: Certainty::Proven,
            alternatives: Causes::NONE,
        },
        false => Ruling {
            named,
            certainty: Certainty::Inferred,
            alternatives: named.map_or(all, |named| all.without(named)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::CauseKind::{PidsCgroup, SecurityModule, ThreadsMax, UserProcesses};
    use super::Standing::{Excluded, Open, Remote, Shown, Signed};
    use super::*;

    fn ruled(standings: [Standing; 3], repeated: bool) -> (Option<CauseKind>, Certainty, Causes) {
        let kinds = [UserProcesses, ThreadsMax, PidsCgroup];
        let checks: Vec<_> = kinds.into_iter().zip(standings).collect();
        let Ruling {
            named,
            certainty,
            alternatives,
        } = rule(&checks, repeated);
        (named, certainty, alternatives)
    }

    #[test]
    fn proven_needs_evidence_a_repetition_and_nothing_before() {
        let user = Some(UserProcesses);
        let proven = |standings| ruled(standings, true) == (user, Certainty::Proven, Causes::NONE);
        assert!(proven([Shown, Excluded, Excluded]));
        assert!(proven([Shown, Shown, Open]));
        let later = ruled([Open, Shown, Excluded], true);
        let others = Causes::NONE.with(UserProcesses);
        assert_eq!(later, (Some(ThreadsMax), Certainty::Inferred, others));
        let once = ruled([Shown, Excluded, Excluded], false);
        assert_eq!(once, (user, Certainty::Inferred, Causes::NONE));
        let signed = ruled([Signed, Excluded, Excluded], true);
        assert_eq!(signed, (user, Certainty::Inferred, Causes::NONE));
    }

    #[test]
    fn of_two_without_a_sign_none_is_named() {
        let both: Causes = [UserProcesses, PidsCgroup].into_iter().collect();
        let found = ruled([Open, Excluded, Open], true);
        assert_eq!(found, (None, Certainty::Unknown, both));
        let found = ruled([Open, Excluded, Remote], true);
        let other = both.without(UserProcesses);
        assert_eq!(found, (Some(UserProcesses), Certainty::Inferred, other));
        let found = ruled([Signed, Excluded, Signed], true);
        assert_eq!(found, (Some(UserProcesses), Certainty::Inferred, other));
        let found = ruled([Excluded, Excluded, Excluded], true);
        assert_eq!(found, (None, Certainty::Unknown, Causes::NONE));
        let found = rule(&[(SecurityModule, Remote)], true);
        assert_eq!(found.named, None);
    }
}
