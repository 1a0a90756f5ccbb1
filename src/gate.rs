//! [`StartGate`]: threads that start together, or not at all.

use crate::mem::Shared;
use crate::sync::Entrance;

/// Threads that are created, set up, and wait; then all of them run, or none.
///
/// A virtual machine runs all of its vCPUs or none. With a barrier of n + 1, a third thread that is refused leaves the
/// first two waiting for ever. Here an error that is returned on the way, or a panic, drops the gate, and the threads end
/// without having run their closures:
///
/// ```
/// # fn run(cpu: u32) -> u32 { cpu }
/// fn start(cpus: u32) -> Result<Vec<nptl::JoinHandle<u32>>, nptl::SpawnError> {
///     let gate = nptl::StartGate::new();
///     let threads = (0..cpus)
///         .map(|cpu| nptl::Builder::new().start_gate(&gate).spawn(move || run(cpu)))
///         .collect::<Result<Vec<_>, _>>()?; // refused: the gate is dropped, and nothing has run
///     gate.open();
///     Ok(threads)
/// }
/// let threads = start(4).unwrap();
/// assert!(threads.into_iter().map(|thread| thread.join().unwrap()).eq(0..4));
/// ```
///
/// What was moved into a closure that did not run is dropped once: where its handle is joined or dropped, or by its own
/// thread if it has no handle. [`join`](crate::JoinHandle::join) then gives [`Cancelled`](crate::Cancelled).
///
/// A [`scope`](crate::scope()) that panics cancels the gates of its threads. A scope that returns waits for its threads,
/// those at a gate included: open or drop the gate inside.
#[derive(Debug)]
#[must_use = "dropping it cancels the threads that wait"]
pub struct StartGate(Option<Shared<Entrance>>);

impl StartGate {
    /// A gate that is closed. Where there is no memory for it, the first thread is refused at
    /// [`Step::Allocate`](crate::Step::Allocate).
    ///
    /// ```
    /// let gate = nptl::StartGate::new();
    /// let vcpu = nptl::Builder::new().start_gate(&gate).spawn(|| ())?;
    /// assert!(!vcpu.is_finished());
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn new() -> StartGate {
        StartGate(crate::spawn::share(Entrance::new()).ok())
    }

    /// Lets all threads run, those as well that a [`Builder`](crate::Builder) with this gate creates later.
    ///
    /// ```
    /// let gate = nptl::StartGate::new();
    /// let vcpu = nptl::Builder::new().start_gate(&gate).spawn(|| "runs")?;
    /// gate.open();
    /// assert_eq!(vcpu.join().unwrap(), "runs");
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn open(self) {
        self.decide(true);
    }

    /// Ends all threads without running their closures, like dropping the gate.
    ///
    /// ```
    /// let gate = nptl::StartGate::new();
    /// let vcpu = nptl::Builder::new().start_gate(&gate).spawn(|| "runs")?;
    /// gate.cancel();
    /// assert!(vcpu.join().unwrap_err().is::<nptl::Cancelled>());
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn cancel(self) {}

    fn decide(&self, open: bool) {
        if let Some(entrance) = &self.0 {
            entrance.decide(open);
        }
    }

    pub(crate) fn entrance(&self) -> Option<&Shared<Entrance>> {
        self.0.as_ref()
    }
}

impl Default for StartGate {
    fn default() -> StartGate {
        StartGate::new()
    }
}

impl Drop for StartGate {
    fn drop(&mut self) {
        // After `open`, without effect: the first decision stays.
        self.decide(false);
    }
}
