//! The stack ledger alone: random steps against a model made of plain vectors, and what a forked
//! child finds. And the cache, as its users see it, against another model.

mod cache;
#[expect(
    dead_code,
    reason = "the crate's own file, of which a part is used here"
)]
#[path = "../../src/sys/futex.rs"]
mod futex;
#[expect(
    dead_code,
    reason = "the crate's own file, of which a part is used here"
)]
#[path = "../../src/stack/ledger/mod.rs"]
mod ledger;
#[expect(
    dead_code,
    reason = "the crate's own file, of which a part is used here"
)]
#[path = "../../src/sync/lock.rs"]
mod lock;

// The names by which the files above know each other.
mod sync {
    pub(crate) use crate::lock;
}
mod sys {
    pub(crate) use crate::futex;
}

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use ledger::accounts::Tally;
use ledger::class::{Class, fit};
use ledger::{Budget, EVICT, Entry, LOOK, LOOK_ON_MISS, Ledger, Links, State, Stats, Victims};
use proptest::prelude::*;

struct Stack {
    id: usize,
    links: Links<Stack>,
    class: Option<Class>,
    bytes: usize,
    resident: AtomicUsize,
    /// The tid word is not zero.
    held: AtomicBool,
    /// The thread was to give the stack back itself.
    detached: AtomicBool,
}

// SAFETY: `links` returns the entry's own field.
unsafe impl Entry for Stack {
    fn links(&self) -> &Links<Self> {
        &self.links
    }
    fn class(&self) -> Option<Class> {
        self.class
    }
    fn bytes(&self) -> usize {
        self.bytes
    }
    fn resident(&self) -> usize {
        self.resident.load(SeqCst)
    }
    fn measure(&self) -> Option<usize> {
        self.measured()
    }
    fn released(&self) -> bool {
        !self.held.load(SeqCst)
    }
    fn is_discarded(&self) -> bool {
        true
    }
}

impl Stack {
    /// Less than the bound, and not known of every one.
    fn measured(&self) -> Option<usize> {
        (!self.id.is_multiple_of(7)).then(|| self.resident.load(SeqCst) / 3)
    }
}

fn stack(id: usize, class: Option<usize>, bytes: usize, resident: usize) -> &'static Stack {
    Box::leak(Box::new(Stack {
        id,
        links: Links::new(),
        class: class.map(nth_class),
        bytes,
        resident: AtomicUsize::new(resident),
        held: AtomicBool::new(false),
        detached: AtomicBool::new(false),
    }))
}

fn nth_class(n: usize) -> Class {
    fit((n + 1) * 4096, 4096, 4096).expect("small").class
}

fn leaked(budget: Budget) -> &'static Ledger<Stack> {
    Box::leak(Box::new(Ledger::new(budget)))
}

const CLASSES: usize = 3;

#[derive(Clone, Debug)]
enum Action {
    Adopt {
        class: Option<usize>,
        bytes: usize,
        resident: usize,
    },
    /// The last field says which munmap calls fail.
    Take(usize, u32),
    /// A thread starts on a live stack.
    Start(usize),
    /// The kernel clears the tid word of a stack.
    Release(usize),
    Give(usize, u32),
    /// By the detached thread that runs on it.
    GiveRunning(usize),
    GiveTwice(usize),
    Retire(usize, u32),
    RetireHeld(usize, u32),
    Resident(usize, usize),
    Trim(usize, u32),
    Clear(u32),
    SetBudget(Budget, u32),
    /// The thread of a live stack dies without giving it back.
    Die(usize),
    Sweep(u32),
    HandOver(u32),
    /// The caller stops unmapping after so many.
    TrimPartly(usize, usize),
}

fn budget() -> impl Strategy<Value = Budget> {
    let limit = |most: usize| prop_oneof![3 => Just(usize::MAX), 4 => 0..most];
    prop_oneof![
        1 => Just(Budget::NOTHING),
        6 => (limit(300), limit(3000), limit(30))
            .prop_map(|(resident, bytes, stacks)| Budget { resident, bytes, stacks }),
    ]
}

fn step() -> impl Strategy<Value = Action> {
    // Most of the time munmap works.
    let fails = || prop_oneof![5 => Just(0), 1 => any::<u32>(), 1 => Just(u32::MAX)];
    let class = prop_oneof![12 => (0..CLASSES).prop_map(Some), 1 => Just(None)];
    prop_oneof![
        16 => (class, 1usize..200, 0usize..40)
            .prop_map(|(class, bytes, resident)| Action::Adopt { class, bytes, resident }),
        20 => (0..CLASSES, fails()).prop_map(|(class, fails)| Action::Take(class, fails)),
        14 => any::<usize>().prop_map(Action::Start),
        18 => any::<usize>().prop_map(Action::Release),
        26 => (any::<usize>(), fails()).prop_map(|(pick, fails)| Action::Give(pick, fails)),
        6 => any::<usize>().prop_map(Action::GiveRunning),
        1 => any::<usize>().prop_map(Action::GiveTwice),
        2 => (any::<usize>(), fails()).prop_map(|(pick, fails)| Action::Retire(pick, fails)),
        2 => (any::<usize>(), fails()).prop_map(|(pick, fails)| Action::RetireHeld(pick, fails)),
        3 => (any::<usize>(), 0usize..60).prop_map(|(pick, bytes)| Action::Resident(pick, bytes)),
        2 => (0usize..300, fails()).prop_map(|(bytes, fails)| Action::Trim(bytes, fails)),
        1 => fails().prop_map(Action::Clear),
        2 => (budget(), fails()).prop_map(|(budget, fails)| Action::SetBudget(budget, fails)),
        2 => any::<usize>().prop_map(Action::Die),
        2 => fails().prop_map(Action::Sweep),
        1 => fails().prop_map(Action::HandOver),
        1 => (0usize..300, 0usize..4).prop_map(|(bytes, n)| Action::TrimPartly(bytes, n)),
    ]
}

#[derive(Clone, Copy)]
enum Bound {
    Budget,
    Resident(usize),
    Nothing,
}

/// The same policy on vectors. Fronts are the warm ends, except for the queues `pending` and
/// `doomed`.
struct Model {
    stacks: Vec<&'static Stack>,
    state: Vec<State>,
    /// As the ledger last read it.
    resident: Vec<usize>,
    was_cached: Vec<bool>,
    budget: Budget,
    pending: VecDeque<usize>,
    doomed: VecDeque<usize>,
    classes: [VecDeque<usize>; CLASSES],
    unmeasured: VecDeque<usize>,
    measured: VecDeque<usize>,
    hits: u64,
    misses: u64,
    evictions: u64,
    refused: u64,
}

impl Model {
    fn new(budget: Budget) -> Self {
        Model {
            stacks: Vec::new(),
            state: Vec::new(),
            resident: Vec::new(),
            was_cached: Vec::new(),
            budget,
            pending: VecDeque::new(),
            doomed: VecDeque::new(),
            classes: Default::default(),
            unmeasured: VecDeque::new(),
            measured: VecDeque::new(),
            hits: 0,
            misses: 0,
            evictions: 0,
            refused: 0,
        }
    }

    fn tally(&self, state: State) -> Tally {
        let ids = || (0..self.stacks.len()).filter(|&id| self.state[id] == state);
        Tally {
            stacks: ids().count(),
            bytes: ids().map(|id| self.stacks[id].bytes).sum(),
            resident: ids().map(|id| self.resident[id]).sum(),
        }
    }

    fn stats(&self) -> Stats {
        Stats {
            live: self.tally(State::Live),
            pending: self.tally(State::Pending),
            cached: self.tally(State::Cached),
            doomed: self.tally(State::Doomed),
            unmapping: self.tally(State::Unmapping),
            hits: self.hits,
            misses: self.misses,
            evictions: self.evictions,
            refused: self.refused,
        }
    }

    fn class(&self, id: usize) -> Option<usize> {
        (0..CLASSES).find(|&n| self.stacks[id].class == Some(nth_class(n)))
    }

    fn set(&mut self, id: usize, state: State) {
        let others = [
            &mut self.pending,
            &mut self.doomed,
            &mut self.unmeasured,
            &mut self.measured,
        ];
        for list in self.classes.iter_mut().chain(others) {
            list.retain(|&other| other != id);
        }
        self.was_cached[id] = self.state[id] == State::Cached;
        self.state[id] = state;
        self.resident[id] = if state == State::Live {
            0
        } else {
            self.stacks[id].resident()
        };
    }

    fn shelve(&mut self, id: usize, warm: bool) {
        self.set(id, State::Cached);
        let stack = self.stacks[id];
        let fits = stack.bytes <= self.budget.bytes
            && stack.resident() <= self.budget.resident
            && self.budget.stacks > 0;
        match self.class(id) {
            Some(n) if fits => {
                self.unmeasured.push_front(id);
                if warm {
                    self.classes[n].push_front(id);
                } else {
                    self.classes[n].push_back(id);
                }
            }
            _ => {
                self.state[id] = State::Doomed;
                self.doomed.push_back(id);
            }
        }
    }

    fn settle(&mut self, n: usize) {
        for _ in 0..n.min(self.pending.len()) {
            let id = self.pending.pop_front().expect("not empty");
            if self.stacks[id].released() {
                self.shelve(id, true);
            } else {
                self.pending.push_back(id);
            }
        }
    }

    fn next(&mut self, limit: Bound) -> Option<Victim> {
        let most = match limit {
            Bound::Budget => self.budget,
            Bound::Resident(resident) => Budget {
                resident: resident.min(self.budget.resident),
                ..self.budget
            },
            Bound::Nothing => Budget::NOTHING,
        };
        let cached = self.tally(State::Cached);
        let memory = cached.resident > most.resident;
        let others = cached.stacks > most.stacks || cached.bytes > most.bytes;
        if memory && !others && matches!(limit, Bound::Budget) {
            let small = |id: usize| self.resident[id] <= most.resident / 64;
            match self.unmeasured.back() {
                Some(&id) if self.unmeasured.len() > 1 || !small(id) => {
                    return Some(Victim::Measure(id));
                }
                _ => {}
            }
        }
        let coldest = || self.measured.back().or(self.unmeasured.back());
        let id = if memory || others {
            coldest()
        } else {
            self.doomed.front()
        }
        .copied()?;
        let resident = self.resident[id];
        self.set(id, State::Unmapping);
        self.resident[id] = resident;
        Some(Victim::Unmap(id))
    }

    fn measure(&mut self, id: usize) {
        assert_eq!(self.unmeasured.pop_back(), Some(id));
        self.measured.push_front(id);
        if let Some(resident) = self.stacks[id].measured() {
            self.resident[id] = resident;
        }
    }

    /// Of all that is cached, or that a thread has left.
    fn round(&self, limit: Bound) -> ModelVictims {
        ModelVictims {
            limit,
            left: 2 * (self.pending.len() + self.unmeasured.len() + self.measured.len())
                + self.doomed.len(),
            look: self.pending.len(),
            first: None,
        }
    }

    /// What a `give` or a `take` makes its caller unmap.
    fn round_of_few(&mut self) -> ModelVictims {
        let (left, first) = match self.next(Bound::Budget) {
            Some(Victim::Unmap(id)) => (EVICT - 1, Some(id)),
            Some(Victim::Measure(_)) => (EVICT, None),
            None => (0, None),
        };
        ModelVictims {
            limit: Bound::Budget,
            left,
            look: 0,
            first,
        }
    }

    fn pick(&self, n: usize, wanted: impl Fn(usize) -> bool) -> Option<usize> {
        let ids: Vec<_> = (0..self.stacks.len()).filter(|&id| wanted(id)).collect();
        (!ids.is_empty()).then(|| ids[n % ids.len()])
    }
}

enum Victim {
    Unmap(usize),
    Measure(usize),
}

/// What the model expects of a `Victims`.
struct ModelVictims {
    limit: Bound,
    left: usize,
    look: usize,
    /// Found when the round began.
    first: Option<usize>,
}

/// The ledger and its model, side by side.
struct SideBySide {
    ledger: &'static Ledger<Stack>,
    spare: &'static Ledger<Stack>,
    model: Model,
}

impl SideBySide {
    /// Unmaps what `victims` yields, and compares each with what the model expects.
    fn unmap(
        &mut self,
        mut victims: Victims<'_, Stack>,
        round: ModelVictims,
        fails: u32,
        stop: usize,
    ) {
        let ModelVictims {
            limit,
            mut left,
            mut look,
            first,
        } = round;
        let model = &mut self.model;
        let next = |model: &mut Model, left: &mut usize, look: &mut usize| {
            while *left > 0 {
                let n = (*look).min(32);
                *look -= n;
                model.settle(n);
                match model.next(limit) {
                    Some(Victim::Unmap(id)) => {
                        *left -= 1;
                        return Some(id);
                    }
                    Some(Victim::Measure(id)) => {
                        *left -= 1;
                        model.measure(id);
                    }
                    None if *look == 0 => *left = 0,
                    None => {}
                }
            }
            None
        };
        let mut expected = first;
        let mut failed = None;
        for n in 0.. {
            if let Some(id) = failed.take() {
                model.shelve(id, false);
            }
            if expected.is_none() {
                expected = next(model, &mut left, &mut look);
            }
            let got = victims.pop();
            assert_eq!(got.map(|stack| stack.id), expected, "victim {n}");
            let (Some(stack), Some(id)) = (got, expected.take()) else {
                break;
            };
            if n == stop {
                // Handed out, neither unmapped nor put back.
                drop(victims);
                model.shelve(id, false);
                break;
            }
            assert!(stack.released(), "about to unmap the stack of a thread");
            if fails & 1 << (n % 32) == 0 {
                victims.unmapped();
                model.evictions += u64::from(model.was_cached[id]);
                model.set(id, State::Gone);
            } else {
                // As when munmap failed and MADV_DONTNEED did not.
                stack.resident.store(stack.resident() / 2, SeqCst);
                failed = Some(id);
            }
            let stats = self.ledger.stats();
            assert_eq!(stats, model.stats());
        }
    }

    fn step(&mut self, step: Action) {
        let ledger = self.ledger;
        let model = &mut self.model;
        match step {
            Action::Adopt {
                class,
                bytes,
                resident,
            } => {
                let gone = model.pick(0, |id| {
                    model.state[id] == State::Gone
                        && model.class(id) == class
                        && model.stacks[id].bytes == bytes
                });
                let id = gone.unwrap_or_else(|| {
                    model
                        .stacks
                        .push(stack(model.stacks.len(), class, bytes, resident));
                    model.state.push(State::Gone);
                    model.resident.push(0);
                    model.was_cached.push(false);
                    model.stacks.len() - 1
                });
                ledger.adopt(model.stacks[id]);
                model.set(id, State::Live);
            }
            Action::Take(class, fails) => {
                let before = model.pending.len();
                model.settle(LOOK);
                if model.classes[class].is_empty() {
                    model.settle(LOOK_ON_MISS.min(before.saturating_sub(LOOK)));
                }
                let expected = model.classes[class].front().copied();
                let (got, victims) = ledger.take(nth_class(class), true);
                assert_eq!(got.map(|stack| stack.id), expected);
                match expected {
                    Some(id) => {
                        assert!(
                            model.stacks[id].released(),
                            "handed out before the kernel cleared the tid word"
                        );
                        model.hits += 1;
                        model.set(id, State::Live);
                    }
                    None => model.misses += 1,
                }
                let round = model.round_of_few();
                assert_eq!(ledger.stats(), model.stats());
                self.unmap(victims, round, fails, usize::MAX);
            }
            Action::GiveRunning(n) => {
                let running = |id: usize| {
                    model.state[id] == State::Live
                        && !model.stacks[id].released()
                        && !model.stacks[id].detached.load(SeqCst)
                };
                if let Some(id) = model.pick(n, running) {
                    assert!(ledger.give_running(model.stacks[id]));
                    model.set(id, State::Pending);
                    model.pending.push_back(id);
                }
            }
            Action::Start(n) => {
                if let Some(id) = model.pick(n, |id| model.state[id] == State::Live) {
                    model.stacks[id].held.store(true, SeqCst);
                }
            }
            Action::Release(n) => {
                if let Some(id) = model.pick(n, |id| !model.stacks[id].released()) {
                    model.stacks[id].held.store(false, SeqCst);
                }
            }
            Action::Give(n, fails) | Action::RetireHeld(n, fails) => {
                let alive = |id: usize| {
                    model.state[id] == State::Live && !model.stacks[id].detached.load(SeqCst)
                };
                let Some(id) = model.pick(n, alive) else {
                    return;
                };
                let held = !model.stacks[id].released();
                let victims = match step {
                    // A2 comes before the wish to unmap.
                    Action::RetireHeld(..) if held => ledger.retire(model.stacks[id]),
                    _ => ledger.give(model.stacks[id]),
                };
                model.settle(LOOK);
                if model.stacks[id].released() {
                    model.shelve(id, true);
                } else {
                    model.set(id, State::Pending);
                    model.pending.push_back(id);
                }
                let round = model.round_of_few();
                assert_eq!(ledger.stats(), model.stats());
                self.unmap(victims, round, fails, usize::MAX);
            }
            Action::GiveTwice(n) => {
                if let Some(id) = model.pick(n, |id| model.state[id] != State::Live) {
                    assert!(ledger.give(model.stacks[id]).pop().is_none());
                    model.refused += 1;
                }
            }
            Action::Retire(n, fails) => {
                let free =
                    |id: usize| model.state[id] == State::Live && model.stacks[id].released();
                if let Some(id) = model.pick(n, free) {
                    let victims = ledger.retire(model.stacks[id]);
                    model.set(id, State::Unmapping);
                    model.stacks[id].detached.store(false, SeqCst);
                    self.unmap(
                        victims,
                        ModelVictims {
                            limit: Bound::Budget,
                            left: 0,
                            look: 0,
                            first: Some(id),
                        },
                        fails,
                        usize::MAX,
                    );
                }
            }
            Action::Resident(n, bytes) => {
                if let Some(id) = model.pick(n, |id| model.state[id] == State::Live) {
                    model.stacks[id].resident.store(bytes, SeqCst);
                }
            }
            Action::Trim(bytes, fails) => {
                let round = model.round(Bound::Resident(bytes));
                self.unmap(ledger.trim(bytes), round, fails, usize::MAX);
                if fails == 0 {
                    assert!(
                        ledger.stats().cached.resident <= bytes,
                        "trim left too much"
                    );
                }
            }
            Action::TrimPartly(bytes, stop) => {
                let round = model.round(Bound::Resident(bytes));
                self.unmap(ledger.trim(bytes), round, 0, stop);
            }
            Action::Clear(fails) => {
                let round = model.round(Bound::Nothing);
                self.unmap(ledger.clear(), round, fails, usize::MAX);
                if fails == 0 {
                    let stats = ledger.stats();
                    assert_eq!(
                        (stats.cached, stats.doomed),
                        Default::default(),
                        "clear left something"
                    );
                }
            }
            Action::SetBudget(budget, fails) => {
                let round = model.round(Bound::Budget);
                ledger.set_budget(budget);
                model.budget = budget;
                self.unmap(ledger.keep_budget(), round, fails, usize::MAX);
            }
            Action::Die(n) => {
                let running =
                    |id: usize| model.state[id] == State::Live && !model.stacks[id].released();
                if let Some(id) = model.pick(n, running) {
                    model.stacks[id].detached.store(true, SeqCst);
                    model.stacks[id].held.store(false, SeqCst);
                }
            }
            Action::Sweep(fails) => {
                let (mut found, mut reaped) = (Vec::new(), Vec::new());
                let unowned = |stack: &Stack| {
                    let was_detached = stack.detached.swap(false, SeqCst);
                    if was_detached {
                        found.push(stack.id);
                    }
                    was_detached
                };
                let victims = ledger.sweep(unowned, |stack| {
                    // Without the lock, and before another thread can take it.
                    assert_eq!(ledger.stats().unmapping.stacks, 0);
                    reaped.push(stack.id);
                });
                assert_eq!(reaped, found);
                for &id in &found {
                    assert_eq!(model.state[id], State::Live);
                    model.shelve(id, true);
                }
                let missed = |id: usize| {
                    let stack: &Stack = model.stacks[id];
                    model.state[id] == State::Live
                        && stack.released()
                        && stack.detached.load(SeqCst)
                };
                assert_eq!(model.pick(0, missed), None, "not swept");
                self.unmap(
                    victims,
                    ModelVictims {
                        limit: Bound::Budget,
                        left: found.len(),
                        look: 0,
                        first: None,
                    },
                    fails,
                    usize::MAX,
                );
            }
            Action::HandOver(fails) => {
                self.spare.set_budget(model.budget);
                let before = self.spare.stats();
                let victims = ledger.hand_over(self.spare);
                assert_eq!(
                    ledger.stats().mapped(),
                    Tally::default(),
                    "something was left behind"
                );
                let gone: Vec<_> = model
                    .unmeasured
                    .iter()
                    .chain(&model.measured)
                    .rev()
                    .chain(&model.doomed)
                    .copied()
                    .collect();
                let left = gone.len()
                    + model.pending.len()
                    + (0..model.stacks.len())
                        .filter(|&id| model.state[id] == State::Live)
                        .count();
                for id in gone {
                    model.shelve(id, true);
                }
                self.model.hits = before.hits;
                self.model.misses = before.misses;
                self.model.evictions = before.evictions;
                self.model.refused = before.refused;
                (self.ledger, self.spare) = (self.spare, self.ledger);
                self.unmap(
                    victims,
                    ModelVictims {
                        limit: Bound::Budget,
                        left,
                        look: 0,
                        first: None,
                    },
                    fails,
                    usize::MAX,
                );
            }
        }
    }

    fn check(&self) {
        let (ledger, model) = (self.ledger, &self.model);
        let stats = ledger.stats();
        assert_eq!(stats, model.stats());
        let mapped = model
            .state
            .iter()
            .filter(|&&state| state != State::Gone)
            .count();
        assert_eq!(stats.mapped().stacks, mapped);
        let mut seen = vec![State::Gone; model.stacks.len()];
        let mut age = VecDeque::new();
        ledger.for_each(|stack, state| {
            assert_eq!(seen[stack.id], State::Gone, "in two lists");
            seen[stack.id] = state;
            if state == State::Cached {
                age.push_back(stack.id);
            }
        });
        assert_eq!(seen, model.state);
        let expected = model.unmeasured.iter().chain(&model.measured);
        assert!(age.iter().eq(expected), "{age:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn agrees_with_the_model(budget in budget(), steps in prop::collection::vec(step(), 1..800)) {
        let (ledger, spare) = (leaked(budget), leaked(budget));
        let mut pair = SideBySide { ledger, spare, model: Model::new(budget) };
        for step in steps {
            pair.step(step);
            pair.check();
        }
    }
}

/// One class, and what it takes to be over the budget again and again.
#[test]
fn give_unmaps_no_more_than_it_says_and_keeps_up() {
    let ledger = leaked(Budget {
        stacks: 10,
        ..Budget::resident(usize::MAX)
    });
    for id in 0..1000 {
        let stack = stack(id, Some(0), 1, 1);
        stack.held.store(true, SeqCst);
        ledger.adopt(stack);
    }
    let mut all = Vec::new();
    ledger.for_each(|stack, _| all.push(stack));
    let mut unmapped = 0;
    for stack in all {
        // A burst of detached threads: each gives its stack back, then ends.
        let mut victims = ledger.give(stack);
        let mut n = 0;
        while victims.pop().is_some() {
            victims.unmapped();
            n += 1;
        }
        assert!(n <= EVICT);
        unmapped += n;
        stack.held.store(false, SeqCst);
        let stats = ledger.stats();
        assert!(stats.pending.stacks <= 1, "pending stacks pile up");
        assert!(stats.cached.stacks <= 10);
    }
    assert!(unmapped >= 980);
}

#[test]
fn a_budget_of_nothing_caches_nothing() {
    let ledger = leaked(Budget::NOTHING);
    let stack = stack(0, Some(0), 1, 0);
    ledger.adopt(stack);
    let mut victims = ledger.give(stack);
    assert!(take(ledger).is_none());
    assert!(victims.pop().is_some());
    victims.unmapped();
    drop(victims);
    assert_eq!(ledger.stats().mapped(), Tally::default());
}

/// A stack belongs to the cache that adopted it; another one neither takes it nor forgets its own.
#[test]
fn the_wrong_ledger_refuses() {
    let (one, other) = (leaked(Budget::resident(100)), leaked(Budget::resident(100)));
    let stack = stack(0, Some(0), 1, 1);
    one.adopt(stack);
    other.adopt(stack);
    drop(other.give(stack));
    drop(other.retire(stack));
    assert_eq!(
        (other.stats().refused, other.stats().mapped()),
        (3, Tally::default())
    );
    drop(one.give(stack));
    assert!(take(one).is_some());
    assert_eq!(one.stats().refused, 0);
}

unsafe extern "C" {
    fn _Fork() -> libc::pid_t;
}

/// For a forked child: what is not true ends it with that text. It must neither allocate nor panic,
/// because after `_Fork` another thread's malloc or stderr lock is never opened again.
macro_rules! ensure {
    ($true:expr) => {
        if !$true {
            return Err(concat!("in the child, not true: ", stringify!($true), "\n"));
        }
    };
}

/// Runs `child` in a forked child and says whether all was well there.
#[must_use]
fn in_child(child: impl FnOnce() -> Result<(), &'static str>) -> bool {
    // SAFETY: the child touches nothing but the ledger and leaves by _exit.
    let pid = unsafe { _Fork() };
    if pid == 0 {
        // SAFETY: no pointers. A child that hangs fails instead.
        unsafe { libc::alarm(20) };
        let result = child();
        if let Err(text) = result {
            // SAFETY: `text` is readable for its length.
            unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
        }
        // SAFETY: ends the child without running the test harness's exit handlers.
        unsafe { libc::_exit(i32::from(result.is_err())) };
    }
    let mut status = 0;
    // SAFETY: `status` is writable; the child is ours.
    pid > 0 && unsafe { libc::waitpid(pid, &mut status, 0) } == pid && status == 0
}

/// A ledger with the caller's stack, another thread's, a pending one and a cached one.
fn populated() -> (&'static Ledger<Stack>, [&'static Stack; 4]) {
    let ledger = leaked(Budget::resident(100));
    let stacks = [0, 1, 2, 3].map(|id| stack(id, Some(0), 1, 1));
    for stack in stacks {
        ledger.adopt(stack);
        stack.held.store(stack.id < 3, SeqCst);
    }
    drop(ledger.give(stacks[2]));
    drop(ledger.give(stacks[3]));
    (ledger, stacks)
}

/// The states of a populated ledger's four stacks.
fn states(ledger: &Ledger<Stack>) -> [State; 4] {
    let mut all = [State::Gone; 4];
    ledger.for_each(|stack, state| all[stack.id] = state);
    all
}

/// A cached stack of the first class, without unmapping any.
fn take(ledger: &'static Ledger<Stack>) -> Option<&'static Stack> {
    ledger.take(nth_class(0), true).0
}

use State::{Cached, Live, Pending};

/// In a forked child: all but the first stack are those of threads that are not here.
fn rebuild(ledger: &'static Ledger<Stack>, stacks: [&'static Stack; 4]) {
    for stack in stacks {
        stack.held.store(stack.id == 0, SeqCst);
    }
    // SAFETY: the child's only thread is not inside the ledger.
    unsafe { ledger.rebuild(stacks.into_iter(), |stack| stack.id == 0) };
}

#[test]
fn a_child_has_the_stacks_of_the_threads_it_lost() {
    let (ledger, stacks) = populated();
    let good = in_child(|| {
        // Again and again, as by a child that is forked in the middle of it.
        for _ in 0..3 {
            rebuild(ledger, stacks);
            ensure!(states(ledger) == [Live, Cached, Cached, Cached]);
        }
        let stats = ledger.stats();
        ensure!((stats.live.stacks, stats.cached.stacks, stats.refused) == (1, 3, 0));
        ensure!((stats.cached.bytes, stats.cached.resident) == (3, 3));
        for _ in 0..3 {
            ensure!(take(ledger).is_some());
        }
        ensure!(take(ledger).is_none());
        Ok(())
    });
    assert!(good);
    assert_eq!(states(ledger), [Live, Live, Pending, Cached]);
    stacks[0].held.store(false, SeqCst);
    drop(ledger.give(stacks[0]));
    assert_eq!(ledger.stats().refused, 0);
}

/// Another thread is in the middle of the lists at the time of the fork, and of unmapping a stack.
#[test]
fn a_child_finds_the_lock_free_and_forgets_what_was_being_unmapped() {
    let (ledger, stacks) = populated();
    let inside = &std::sync::Barrier::new(2);
    let mut good = false;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut victims = ledger.clear();
            assert_eq!(victims.pop().map(|stack| stack.id), Some(3));
            let mut first = true;
            ledger.for_each(|_, _| {
                if std::mem::take(&mut first) {
                    inside.wait();
                    inside.wait();
                }
            });
        });
        inside.wait();
        good = in_child(|| {
            rebuild(ledger, stacks);
            ensure!(states(ledger) == [Live, Cached, Cached, State::Gone]);
            ensure!(ledger.stats().mapped().stacks == 3);
            // It can be adopted again, should its record serve another mapping.
            ledger.adopt(stacks[3]);
            ensure!(states(ledger)[3] == Live);
            Ok(())
        });
        inside.wait();
    });
    assert!(good);
    assert_eq!(states(ledger), [Live, Live, Pending, Cached]);
}

/// Threads that give and take all the while, as the forking thread finds them at any point.
#[test]
fn a_child_never_finds_the_lists_torn() {
    let (ledger, stacks) = populated();
    let stop = &AtomicBool::new(false);
    let mut good = false;
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(move || {
                while !stop.load(SeqCst) {
                    if let Some(stack) = take(ledger) {
                        drop(ledger.give(stack));
                    }
                }
            });
        }
        good = (0..300).all(|_| {
            in_child(|| {
                rebuild(ledger, stacks);
                ensure!(states(ledger) == [Live, Cached, Cached, Cached]);
                ensure!(ledger.stats().cached.stacks == 3);
                for _ in 0..3 {
                    ensure!(take(ledger).is_some());
                }
                Ok(())
            })
        });
        stop.store(true, SeqCst);
    });
    assert!(good);
}

/// The lock over the real futex, with more threads than processors.
#[test]
fn the_lock_excludes_and_wakes() {
    const THREADS: usize = 8;
    const ROUNDS: usize = 50_000;
    let lock = &lock::Lock::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(move || {
                for n in 0..ROUNDS {
                    let mut sum = lock.lock();
                    let old = *sum;
                    if n % 100 == 0 {
                        // Makes others sleep.
                        std::thread::yield_now();
                    }
                    *sum = old + 1;
                }
            });
        }
    });
    assert_eq!(*lock.lock(), THREADS * ROUNDS);
}
