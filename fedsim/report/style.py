"""The page's style: one column, readable on a phone, in light and in dark."""

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #f4f5f7; --sheet: #ffffff; --ink: #1b1f24; --quiet: #4f5865; --line: #d4d8de;
  --leak: #b3261e; --leak-soft: #fbe9e7; --safe: #1c6b3f; --safe-soft: #e6f4ea;
  --warn: #7a4f00; --warn-soft: #fdf1d8; --link: #0b57a4; --bar: #3f6c9c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #121519; --sheet: #1b2026; --ink: #e9ecef; --quiet: #adb5bf; --line: #39414b;
    --leak: #ff8f84; --leak-soft: #3a1f1d; --safe: #7fd6a0; --safe-soft: #17301f;
    --warn: #f2c46d; --warn-soft: #352a12; --link: #8ec1ff; --bar: #7fa8d6;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere;
}
header, main, footer { max-width: 1080px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 28px; }
.kind { color: var(--quiet); margin: 0; font-size: .9rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 2px 0 16px; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 8px; }
h3 { font-size: 1rem; margin: 22px 0 6px; }
p { margin: 0 0 10px; max-width: 72ch; }
section {
  background: var(--sheet); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin: 16px 0;
}
.verdict { border-left: 6px solid var(--quiet); }
.verdict.leaks { border-left-color: var(--leak); }
.verdict.holds { border-left-color: var(--safe); }
.verdict.broken { border-left-color: var(--warn); background: var(--warn-soft); }
.verdict > p:first-of-type { font-size: 1.2rem; line-height: 1.45; }
.alarm {
  background: var(--warn-soft); color: var(--ink); border-left: 6px solid var(--warn);
  padding: 10px 14px; margin: 12px 0; border-radius: 4px;
}
.quiet, figcaption, caption { color: var(--quiet); font-size: .9rem; }
a { color: var(--link); }
code, pre { font: .88rem/1.5 ui-monospace, Consolas, "DejaVu Sans Mono", monospace; }
pre {
  background: var(--ground); border: 1px solid var(--line); border-radius: 6px;
  padding: 10px 12px; margin: 6px 0 12px; overflow-x: auto; white-space: pre-wrap;
}
.badge {
  display: inline-block; border-radius: 999px; padding: 0 9px; font-size: .82rem;
  line-height: 1.5rem; border: 1px solid currentColor; white-space: nowrap;
}
.badge.leaked, .badge.oracle { color: var(--leak); background: var(--leak-soft); }
.badge.safe { color: var(--safe); background: var(--safe-soft); }
.badge.plain { color: var(--quiet); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 10px;
  margin: 14px 0 4px; padding: 0; }
.facts div { border-top: 3px solid var(--line); padding-top: 6px; }
.facts dt { color: var(--quiet); font-size: .9rem; }
.facts dd { margin: 0; font-size: 1.3rem; font-weight: 600; line-height: 1.3; }
.facts dd small { display: block; font-size: .85rem; font-weight: 400; color: var(--quiet); }
.table { overflow-x: auto; margin: 8px 0 14px; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; overflow-wrap: normal; }
caption { text-align: left; padding-bottom: 4px; }
th, td { text-align: left; vertical-align: top; padding: 6px 14px 6px 0;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--quiet); font-weight: 600; }
tbody th { font-weight: 600; }
th .quiet { font-weight: 400; }
.meaning { display: inline-block; margin-left: 6px; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.no { color: var(--quiet); }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr));
  gap: 16px 14px; padding: 0; margin: 12px 0 4px; list-style: none; }
.pairs figure { margin: 0; }
.pairs .both { display: grid; grid-template-columns: 1fr 1fr; gap: 3px; }
.pairs img, .pairs .none { width: 100%; aspect-ratio: 1; object-fit: contain; display: block;
  background: var(--ground); image-rendering: pixelated; border-radius: 3px; }
.pairs .none { display: grid; place-items: center; color: var(--quiet); font-size: .8rem;
  border: 1px dashed var(--line); text-align: center; }
.pairs figcaption { font-size: .82rem; line-height: 1.35; margin-top: 4px; }
.pairs figcaption > span { display: block; }
.pairs figcaption .badge { font-size: .76rem; padding: 0 7px; line-height: 1.3rem; }
.pairs figcaption strong { color: var(--ink); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 290px), 1fr));
  gap: 18px 28px; }
.charts figure { margin: 0; }
svg { width: 100%; max-width: 520px; height: auto; display: block; }
svg text { fill: var(--ink); font-size: 12px; }
svg .tick { fill: var(--quiet); }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .track { fill: var(--line); }
svg .leaked { fill: var(--leak); }
svg .bar { fill: var(--bar); }
svg .whisker { stroke: var(--ink); stroke-width: 1.6; fill: none; }
svg .curve { stroke: var(--leak); stroke-width: 2.4; fill: none; }
svg .floor { stroke: var(--ink); stroke-width: 1.8; stroke-dasharray: 5 3; }
svg .limit { stroke: var(--quiet); stroke-width: 1.2; stroke-dasharray: 1.5 3; }
svg .limit-word { fill: var(--quiet); }
details { margin: 8px 0; }
summary { cursor: pointer; }
ul.plain { margin: 4px 0 12px; padding-left: 20px; }
footer { color: var(--quiet); font-size: .88rem; padding: 8px 16px 40px; }
@media (max-width: 520px) {
  section { padding: 14px 14px; margin: 12px 0; border-radius: 8px; }
  header, main { padding-left: 10px; padding-right: 10px; }
  .pairs { grid-template-columns: 1fr 1fr; gap: 12px; }
}
@media print { section { break-inside: avoid; } body { background: none; } }
"""
