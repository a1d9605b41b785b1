//! How much memory the process may still take.

use std::fs;

const CGROUP: &str = "/sys/fs/cgroup";

/// Bytes that can be had without swapping: the machine's, or the container's where that is
/// less. `None` where the system does not tell.
pub(crate) fn available() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok();
    let machine = machine.and_then(|text| machine_available(&text));
    let read = |file: &str| fs::read_to_string(format!("{CGROUP}/{file}")).ok();
    let container = || {
        container_available(
            &read("memory.max")?,
            &read("memory.current")?,
            &read("memory.stat")?,
        )
    };
    machine.into_iter().chain(container()).min()
}

/// From `/proc/meminfo`.
fn machine_available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// From the files of cgroup v2. Cached file pages that nobody uses count as available.
fn container_available(max: &str, current: &str, stat: &str) -> Option<u64> {
    // "max" where there is no limit.
    let max: u64 = max.trim().parse().ok()?;
    let current: u64 = current.trim().parse().ok()?;
    let cached = stat.lines().find_map(|l| l.strip_prefix("inactive_file "));
    let cached: u64 = cached.and_then(|n| n.trim().parse().ok()).unwrap_or(0);
    Some(max.saturating_sub(current.saturating_sub(cached)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:  16 kB\nMemFree:  1 kB\nMemAvailable:      12 kB\n";
        assert_eq!(machine_available(text), Some(12 << 10));
        assert_eq!(machine_available("MemTotal: 16 kB\n"), None);
    }

    #[test]
    fn a_container_counts_idle_file_pages_as_free() {
        let stat = "anon 5\ninactive_file 30\nactive_file 1\n";
        assert_eq!(container_available("100\n", "80\n", stat), Some(50));
        assert_eq!(container_available("max\n", "80\n", stat), None);
        assert_eq!(container_available("10\n", "80\n", ""), Some(0));
    }
}
