//! A doubly linked list threaded through an array: constant-time removal from the middle.

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Link {
    before: u32,
    after: u32,
}

/// Pages in the order in which they were let go. Each page is in it at most once.
#[derive(Debug)]
pub(super) struct LruList {
    links: Vec<Link>,
    front: u32,
    back: u32,
    len: usize,
}

impl LruList {
    /// An empty list of pages below `pages`.
    pub(super) fn new(pages: u32) -> Self {
        let unlinked = Link {
            before: NONE,
            after: NONE,
        };
        Self {
            links: vec![unlinked; pages as usize],
            front: NONE,
            back: NONE,
            len: 0,
        }
    }

    /// Pages in the list.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Adds a page that is not in the list, as the last to be taken.
    pub(super) fn push_back(&mut self, page: u32) {
        self.links[page as usize] = Link {
            before: self.back,
            after: NONE,
        };
        match self.back {
            NONE => self.front = page,
            back => self.links[back as usize].after = page,
        }
        self.back = page;
        self.len += 1;
    }

    /// Takes out a page that is in the list.
    pub(super) fn remove(&mut self, page: u32) {
        let Link { before, after } = self.links[page as usize];
        match before {
            NONE => self.front = after,
            before => self.links[before as usize].after = after,
        }
        match after {
            NONE => self.back = before,
            after => self.links[after as usize].before = before,
        }
        self.len -= 1;
    }

    /// Takes out the page that has been in the list for longest.
    pub(super) fn pop_front(&mut self) -> Option<u32> {
        let page = self.front;
        if page == NONE {
            return None;
        }
        self.remove(page);
        Some(page)
    }
}
