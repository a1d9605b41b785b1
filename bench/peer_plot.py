"""The figures of peers.py as an SVG: a group of bars for each row, as shares of the best."""

COLOURS = ("#0b6e99", "#b0b0b0", "#d9a441", "#8f6bb3", "#6b9e5b")
WIDTH, GROUP, BAR, LEFT, TOP = 860, 18, 12, 190, 46


def svg(names, rows):
    """Longer is better in every row: numbers where less is better are inverted."""
    group = BAR * len(names) + GROUP
    height = TOP + group * len(rows)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
             'font-family="sans-serif" font-size="11">',
             f'<rect width="{WIDTH}" height="{height}" fill="white"/>']
    for i, name in enumerate(names):
        x = LEFT + i * 130
        parts.append(f'<rect x="{x}" y="14" width="10" height="10" fill="{COLOURS[i % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 15}" y="23">{name}</text>')
    for r, (heading, unit, more, row) in enumerate(rows):
        y = TOP + r * group
        worth = {name: median if more else 1 / median for name, (median, _, _) in row.items()}
        best = max(worth.values())
        parts.append(f'<text x="{LEFT - 8}" y="{y + BAR * len(names) / 2 + 4}" text-anchor="end">{heading}</text>')
        for i, name in enumerate(names):
            if name not in row:
                continue
            width = (WIDTH - LEFT - 110) * worth[name] / best
            top = y + i * BAR
            parts.append(f'<rect x="{LEFT}" y="{top}" width="{width:.1f}" height="{BAR - 2}" '
                         f'fill="{COLOURS[i % len(COLOURS)]}"/>')
            median = row[name][0]
            label = f"{median:.2f} {unit}" if unit == "s" else f"{median:.0f} {unit}"
            parts.append(f'<text x="{LEFT + width + 4:.1f}" y="{top + 9}" font-size="9">{label}</text>')
    return "\n".join([*parts, "</svg>\n"])
