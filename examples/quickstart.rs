//! Starts a few threads, joins them, and shows a refusal. Run: `cargo run --example quickstart`.

use std::time::Duration;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // As std::thread, but a refusal is an error that says what refused.
    let handle = nptl::Builder::new()
        .name("vcpu0")
        .stack_size(256 * 1024)
        .spawn(|| nptl::current_name().unwrap_or_default())?;
    println!("started {:?} with {:?}", handle, handle.stack());
    println!("joined: {:?}", handle.join().map_err(|_| "panicked")?);

    let words = ["scoped", "threads", "borrow"];
    let total: usize = nptl::scope(|s| {
        words
            .map(|word| s.spawn(move || word.len()))
            .into_iter()
            .map(|thread| thread.map(|thread| thread.join().unwrap_or(0)))
            .sum::<Result<usize, _>>()
    })?;
    println!("letters counted by three scoped threads: {total}");

    let sleeper = nptl::spawn(|| std::thread::park_timeout(Duration::from_millis(50)))?;
    match sleeper.join_timeout(Duration::from_millis(1)) {
        Ok(_) => println!("joined at once"),
        Err(handle) => {
            println!("still running after 1 ms, joining for good");
            let _ = handle.join();
        }
    }

    let refused = nptl::Builder::new().stack_size(1 << 50).spawn(|| ());
    if let Err(error) = refused {
        println!("a stack of 1 PiB: {error}");
    }
    println!("{:?}", nptl::StackCache::global());
    Ok(())
}
