"""The page's style sheet: light and dark, from a phone's width to a desk's."""

__all__ = ["STYLE"]

STYLE = """
:root { --page: #fbfbf9; --card: #fff; --ink: #22262b; --dim: #646c76; --rule: #dfe2e6;
  --c0: #1f6feb; --c1: #d9580d; --c2: #2a8a4a; --c3: #8a4fc4; --c4: #b3261e; --c5: #0f8b8d;
  --c6: #a8741a; --c7: #c2418c; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --card: #1d2126; --ink: #e4e7eb; --dim: #9aa3ad;
  --rule: #343a42; --c0: #6cb0ff; --c1: #ff9f5a; --c2: #6fd08c; --c3: #c39bff; --c4: #ff8a80; --c5: #5fd3d5;
  --c6: #e6bd62; --c7: #f59bcb; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 20px 16px 40px; }
h1 { font-size: 1.45rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 28px 0 8px; }
h3 { font-size: .95rem; margin: 0 0 6px; overflow-wrap: anywhere; }
h3 small { color: var(--dim); font-weight: 400; }
p { margin: 0 0 8px; color: var(--dim); }
p:empty { display: none; }
.wide, pre { max-width: 100%; overflow-x: auto; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; }
.wide { width: fit-content; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: 5px 14px; border-bottom: 1px solid var(--rule); vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 400; color: var(--dim); position: sticky; left: 0; background: var(--card); }
thead th { font-weight: 600; }
td, thead th { max-width: 26rem; min-width: 8.5rem; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
pre { min-width: 0; margin: 0 0 12px; padding: 10px 14px; font: .82rem/1.5 ui-monospace, monospace; }
.charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); }
figure { margin: 0; padding: 12px 12px 8px; background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  min-width: 0; }
figure > svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--dim); }
.end { text-anchor: end; } .mid { text-anchor: middle; }
.grid line { stroke: var(--rule); stroke-width: 1; }
polyline { fill: none; stroke: var(--curve); stroke-width: 1.8; stroke-linejoin: round; }
circle, path { fill: var(--curve); }
figcaption path[d^="M0 4"] { stroke: var(--curve); stroke-width: 3; }
.again polyline, .again path { stroke-dasharray: 5 3; }
.key path { fill: var(--dim); }
.c0 { --curve: var(--c0); } .c1 { --curve: var(--c1); } .c2 { --curve: var(--c2); } .c3 { --curve: var(--c3); }
.c4 { --curve: var(--c4); } .c5 { --curve: var(--c5); } .c6 { --curve: var(--c6); } .c7 { --curve: var(--c7); }
figcaption ul { list-style: none; margin: 4px 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 16px;
  font-size: .84rem; }
figcaption li { display: flex; align-items: center; gap: 6px; min-width: 0; overflow-wrap: anywhere; }
figcaption svg { width: 18px; height: 9px; flex: none; }
figcaption svg.key { width: 11px; height: 11px; }
figcaption b { font-weight: 600; min-width: 0; } figcaption span { color: var(--dim); white-space: nowrap; }
details { margin-bottom: 10px; }
summary { cursor: pointer; padding: 4px 0; }
footer { margin-top: 32px; color: var(--dim); font-size: .85rem; }
@media (max-width: 600px) { th, td { padding: 4px 9px; } tbody th { min-width: 7rem; } }
@media print { main { max-width: none; } figure { break-inside: avoid; } }
"""
