//! Columns of text.

/// How a column stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// Rows under headings, each column as wide as its widest cell, two blanks between columns.
pub(super) struct Table<const N: usize> {
    columns: [Align; N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    pub(super) fn new(headings: [(&str, Align); N]) -> Self {
        Self {
            columns: headings.map(|(_, align)| align),
            rows: vec![headings.map(|(heading, _)| heading.to_owned())],
        }
    }

    pub(super) fn push(&mut self, row: [String; N]) {
        self.rows.push(row);
    }

    /// The lines, headings first, without blanks at their ends.
    pub(super) fn lines(&self) -> impl Iterator<Item = String> {
        let width = |column: usize| {
            let cells = self.rows.iter().map(|row| row[column].chars().count());
            cells.max().unwrap_or(0)
        };
        let widths: [usize; N] = std::array::from_fn(width);
        self.rows.iter().map(move |row| {
            let cells = row.iter().zip(widths).zip(self.columns);
            let cells = cells.map(|((cell, width), align)| match align {
                Align::Left => format!("{cell:width$}"),
                Align::Right => format!("{cell:>width$}"),
            });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_their_headings() {
        let mut table = Table::new([("NAME", Align::Left), ("N", Align::Right)]);
        table.push(["größe".into(), "5".into()]);
        table.push(["a".into(), "1234".into()]);
        let lines: Vec<String> = table.lines().collect();
        assert_eq!(lines, ["NAME      N", "größe     5", "a      1234"]);
    }
}
