//! Size classes: which cached stack serves which request.
//!
//! A cached stack serves every request of its class, so no search is needed. The price is address space, less than a
//! quarter of the requested stack and at most 14 pages of guard, as `StackCache` documents. Sizes are counted in
//! usable pages, without guard, TLS block and signal stack, so that the common ones (16 KiB, 64 KiB, 256 KiB, 1 MiB,
//! 2 MiB, 8 MiB) are classes of their own and waste nothing.
//!
//! The waste is never touched: it has no pages behind it and counts only towards RLIMIT_AS (and
//! RLIMIT_DATA, and the commit limit in overcommit mode 2).

/// Pages of the largest stack with a class.
const LARGEST: usize = 1 << 18;
/// Pages of the guard that serves 2 to 16 pages.
const WIDE_GUARD: usize = 16;
/// Classes of stack sizes up to [`LARGEST`].
const SIZES: usize = 68;
/// Number of classes: each size with no guard, one page and [`WIDE_GUARD`] pages.
pub(crate) const CLASSES: usize = SIZES * 3;

/// Index of a size class, less than [`CLASSES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Class(u8);

impl Class {
    pub(crate) fn from_index(index: u16) -> Option<Class> {
        let index = u8::try_from(index).ok()?;
        (usize::from(index) < CLASSES).then_some(Class(index))
    }

    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }
}

/// What to map so that the stack serves its whole class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fit {
    pub(crate) class: Class,
    /// Usable bytes, at least the requested ones, a multiple of the page size.
    pub(crate) usable: usize,
    /// Guard bytes, at least the requested ones, a multiple of the page size.
    pub(crate) guard: usize,
}

/// The class of a stack of `usable` bytes with a guard of `guard` bytes, both rounded up to whole
/// pages of `page` bytes. `None`: no class, map exactly what was requested.
pub(crate) fn fit(usable: usize, guard: usize, page: usize) -> Option<Fit> {
    let pages = usable
        .checked_add(page.checked_sub(1)?)?
        .checked_div(page)?
        .max(1);
    if pages > LARGEST {
        return None;
    }
    let (size, pages) = if pages <= 4 {
        (pages - 1, pages)
    } else {
        // pages lies in (2^o, 2^(o+1)], which is cut into four steps of 2^(o-2) pages.
        let octave = (pages - 1).ilog2() as usize - 2;
        let steps = pages.div_ceil(1 << octave);
        (octave * 4 + steps - 1, steps << octave)
    };
    let (kind, guard) = match guard.div_ceil(page) {
        0 => (0, 0),
        1 => (1, 1),
        2..=WIDE_GUARD => (2, WIDE_GUARD),
        _ => return None,
    };
    Some(Fit {
        class: Class(u8::try_from(kind * SIZES + size).ok()?),
        usable: pages.checked_mul(page)?,
        guard: guard * page,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: usize = 1 << 10;
    const MIB: usize = 1 << 20;

    #[test]
    fn common_sizes_waste_nothing() {
        for usable in [
            16 * KIB,
            32 * KIB,
            64 * KIB,
            128 * KIB,
            256 * KIB,
            MIB,
            2 * MIB,
            8 * MIB,
            64 * MIB,
            1 << 30,
        ] {
            for guard in [0, 4096, 64 * KIB] {
                let fit = fit(usable, guard, 4096).expect("has a class");
                assert_eq!((fit.usable, fit.guard), (usable, guard));
            }
        }
    }

    #[test]
    fn every_size_fits_its_class_and_the_classes_are_dense() {
        for page in [4096, 16384, 65536] {
            let mut last = 0;
            for pages in 1..=LARGEST {
                let fit = fit(pages * page - 1, page, page).expect("has a class");
                assert!(fit.usable >= pages * page, "{pages} pages do not fit");
                assert!(
                    (fit.usable / page - pages) * 4 < pages,
                    "{pages} pages waste 25% or more"
                );
                let size = fit.class.index() - SIZES;
                assert!(size == last || size == last + 1, "gap at {pages} pages");
                last = size;
            }
            assert_eq!(last, SIZES - 1);
        }
    }

    #[test]
    fn two_requests_of_one_class_map_the_same() {
        let mut seen = [None; CLASSES];
        for pages in 1..=LARGEST {
            for guard in [0, 1, 2, 3, 15, 16] {
                let fit = fit(pages << 12, guard << 12, 4096).expect("has a class");
                assert!(fit.guard >= guard << 12);
                let first = seen[fit.class.index()].get_or_insert(fit);
                assert_eq!(*first, fit);
            }
        }
        assert!(seen.iter().all(Option::is_some));
    }

    #[test]
    fn extremes() {
        assert_eq!(fit(0, 0, 4096).map(|f| f.usable), Some(4096));
        for usable in [usize::MAX, (LARGEST << 12) + 1] {
            assert_eq!(fit(usable, 4096, 4096), None);
        }
        for guard in [usize::MAX, (WIDE_GUARD << 12) + 1] {
            assert_eq!(fit(4096, guard, 4096), None);
        }
        assert_eq!(
            fit(4096, 4096, 0),
            None,
            "a page size of 0 must not divide by it"
        );
    }
}
