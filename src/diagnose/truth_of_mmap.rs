//! The truth table of a refused stack: worlds are generated, a model of mmap's order of checks refuses the mapping in
//! them and answers the questions, and what is found out must be true.

use super::*;
use crate::diagnose::Certainty;
use crate::diagnose::cause::Causes;
use crate::diagnose::rule::Ruling;
use crate::proc::parse::UNLIMITED;

#[derive(Clone, Copy, Debug, PartialEq)]
struct World {
    filtered: bool,
    /// Whether a filter, which may be a supervisor's, refuses this call alone.
    filter_refuses: bool,
    many: bool,
    no_addresses: bool,
    locked_full: bool,
    exempt: bool,
    size: Limited3,
    data: Limited3,
    /// vm.overcommit_memory, and whether the policy refuses.
    mode: u64,
    commit_full: bool,
    mode_known: bool,
    no_memory: bool,
}

/// A limit in bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Limited3 {
    None,
    Roomy,
    Full,
}

const REQUESTED: u64 = 8 << 20;

impl World {
    /// Every check that refuses such a mapping, in the kernel's order.
    fn refusing(&self, question: Question) -> impl Iterator<Item = CauseKind> {
        let typed = !matches!(question, Question::Count | Question::Addresses);
        let elsewhere = question != Question::Count;
        let writable = matches!(question, Question::Unreserved | Question::Stack);
        let charged = writable && (self.mode == 2 || question == Question::Stack);
        let charged = charged && self.mode != 1;
        [
            (
                CauseKind::Seccomp,
                self.filter_refuses && question == Question::Stack,
            ),
            (CauseKind::MapCount, self.many),
            (
                CauseKind::AddressSpaceExhausted,
                elsewhere && self.no_addresses,
            ),
            (
                CauseKind::LockedMemory,
                elsewhere && self.locked_full && !self.exempt,
            ),
            (
                CauseKind::AddressSpace,
                typed && self.size == Limited3::Full,
            ),
            (
                CauseKind::DataSegment,
                writable && self.data == Limited3::Full,
            ),
            (CauseKind::Overcommit, charged && self.commit_full),
            (CauseKind::KernelMemory, typed && self.no_memory),
        ]
        .into_iter()
        .filter_map(|(kind, refuses)| refuses.then_some(kind))
    }

    fn answer(&self, question: Question) -> Result<(), Errno> {
        match (self.refusing(question).next(), question) {
            (Some(CauseKind::LockedMemory), _) => Err(Errno::EAGAIN),
            (Some(_), _) => Err(Errno::ENOMEM),
            (None, Question::Count) => Err(Errno::EEXIST),
            (None, Question::Addresses) => Err(Errno::EINVAL),
            (None, _) => Ok(()),
        }
    }

    fn status(&self) -> Status {
        Status {
            capabilities: Some(0),
            seccomp: Some(if self.filtered { 2 } else { 0 }),
            tracer: Some(0),
            ..Status::default()
        }
    }

    fn numbers(&self) -> MemoryNumbers {
        let fill = |limited| Fill {
            requested: REQUESTED,
            in_use: Some(100 << 20),
            limit: Some(match limited {
                Limited3::None => UNLIMITED,
                Limited3::Roomy => 200 << 20,
                Limited3::Full => 104 << 20,
            }),
        };
        let full = |full| {
            if full {
                Limited3::Full
            } else {
                Limited3::Roomy
            }
        };
        let commit = fill(full(self.commit_full));
        MemoryNumbers {
            size: fill(self.size),
            data: fill(self.data),
            locked: fill(full(self.locked_full)),
            commit: Overcommit {
                mode: self.mode_known.then_some(self.mode),
                requested: REQUESTED,
                in_use: commit.in_use.filter(|_| self.mode_known),
                limit: commit.limit.filter(|_| self.mode_known),
                reserved: Some(0),
            },
        }
    }
}

fn found(before: &World, at: &World, after: &World) -> Option<Ruling> {
    let refused = at.answer(Question::Stack).err()?;
    let place = |world: &World| {
        let calls = world.status().calls();
        let memory = &mut MemoryOracle::default();
        ask(true, calls, memory, &mut |question| world.answer(question))
    };
    let places = [place(before), place(after)];
    if places == [Place::Nowhere; 2] {
        return None;
    }
    let facts = Facts {
        errno: refused,
        outside: outside(&at.status()),
        places,
        numbers: [before.numbers(), after.numbers()],
        exempt: at.exempt,
    };
    Some(rule(&facts.checks(), true))
}

fn check(before: &World, at: &World, after: &World) -> bool {
    let Some(truth) = at.refusing(Question::Stack).next() else {
        return false;
    };
    let Some(ruling) = found(before, at, after) else {
        return false;
    };
    let stable = before == at && at == after;
    let listed = ruling.alternatives.contains(truth);
    let right = match (ruling.named, ruling.certainty) {
        (Some(named), Certainty::Proven) if stable => named == truth,
        (Some(named), Certainty::Proven) => at.refusing(Question::Stack).any(|kind| kind == named),
        (Some(named), _) => named == truth || listed,
        (None, _) => listed || ruling.alternatives == Causes::NONE,
    };
    assert!(
        right,
        "{truth:?} refused, but {ruling:?}\nbefore: {before:?}\nat: {at:?}\nafter: {after:?}"
    );
    true
}

fn worlds() -> impl Iterator<Item = World> {
    const LIMITS: [Limited3; 3] = [Limited3::None, Limited3::Roomy, Limited3::Full];
    let sizes = [3, 2, 2, 2, 2, 3, 3, 3, 2, 2, 2];
    let count = sizes.iter().product::<usize>();
    (0..count).map(move |number| {
        let mut rest = number;
        let mut next = |size: usize| {
            let digit = rest % size;
            rest /= size;
            digit
        };
        let (filtered, filter_refuses) = [(false, false), (true, false), (true, true)][next(3)];
        World {
            filtered,
            filter_refuses,
            many: next(2) == 1,
            no_addresses: next(2) == 1,
            locked_full: next(2) == 1,
            exempt: next(2) == 1,
            size: LIMITS[next(3)],
            data: LIMITS[next(3)],
            mode: next(3) as u64,
            commit_full: next(2) == 1,
            mode_known: next(2) == 1,
            no_memory: next(2) == 1,
        }
    })
}

#[test]
fn what_stands_is_named_rightly() {
    let seen = worlds().filter(|world| check(world, world, world)).count();
    println!("{seen} refusals");
    assert!(seen > 10_000);
}

/// What another thread has mapped at the refusal, and not before or after it; and what it maps after it.
#[test]
fn what_comes_and_goes_is_never_named_wrongly() {
    for at in worlds() {
        let turned = |change: fn(&mut World)| {
            let mut other = at;
            change(&mut other);
            other
        };
        for other in [
            turned(|world| world.many = !world.many),
            turned(|world| world.no_addresses = !world.no_addresses),
            turned(|world| world.no_memory = !world.no_memory),
            turned(|world| world.commit_full = !world.commit_full && world.mode == 2),
            turned(|world| {
                if world.size == Limited3::Full {
                    world.size = Limited3::Roomy;
                }
            }),
            turned(|world| {
                if world.data == Limited3::Full {
                    world.data = Limited3::Roomy;
                }
            }),
        ] {
            check(&other, &at, &at);
            check(&at, &at, &other);
        }
    }
}

/// Another thread takes the rest of RLIMIT_AS between two questions, and gives it back before the numbers are read: the
/// answers say that a limit on writable mappings refused, which no number explains.
#[test]
fn answers_that_no_limit_explains_leave_the_address_space_possible() {
    let roomy = PLAIN;
    let full = World {
        size: Limited3::Full,
        ..roomy
    };
    for (from, expected) in [
        (Question::Unreserved, Place::DataOrCommit),
        (Question::Stack, Place::Commit),
    ] {
        let mut taken = false;
        let mut kernel = |question| {
            taken |= question == from;
            match taken && question != Question::Count {
                true => full.answer(question),
                false => roomy.answer(question),
            }
        };
        let place = ask(true, Calls::Any, &mut MemoryOracle::default(), &mut kernel);
        assert_eq!(place, expected);
        let facts = Facts {
            errno: Errno::ENOMEM,
            outside: outside(&roomy.status()),
            places: [place; 2],
            numbers: [roomy.numbers(); 2],
            exempt: false,
        };
        let ruling = rule(&facts.checks(), true);
        let possible = ruling.possible().contains(CauseKind::AddressSpace);
        assert!(possible, "{expected:?}: {ruling:?}");
        assert_ne!(ruling.certainty, Certainty::Proven);
    }
}

/// Where nothing refuses.
const PLAIN: World = World {
    filtered: false,
    filter_refuses: false,
    many: false,
    no_addresses: false,
    locked_full: false,
    exempt: false,
    size: Limited3::Roomy,
    data: Limited3::Roomy,
    mode: 0,
    commit_full: false,
    mode_known: true,
    no_memory: false,
};

#[test]
fn one_cause_alone_is_proven() {
    for (change, certainty) in [
        (
            (|world| world.many = true) as fn(&mut World),
            Certainty::Proven,
        ),
        (|world| world.no_addresses = true, Certainty::Proven),
        (|world| world.locked_full = true, Certainty::Proven),
        (|world| world.size = Limited3::Full, Certainty::Proven),
        (|world| world.data = Limited3::Full, Certainty::Proven),
        (|world| world.commit_full = true, Certainty::Proven),
        (
            |world| (world.mode, world.commit_full) = (2, true),
            Certainty::Inferred,
        ),
        (
            |world| (world.mode, world.commit_full, world.data) = (2, true, Limited3::None),
            Certainty::Proven,
        ),
        // No number shows it.
        (|world| world.no_memory = true, Certainty::Unknown),
    ] {
        let mut world = PLAIN;
        change(&mut world);
        assert!(check(&world, &world, &world));
        let ruling = found(&world, &world, &world).expect("a refusal");
        assert_eq!(ruling.certainty, certainty, "{ruling:?} of {world:?}");
    }
}
