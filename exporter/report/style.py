"""Style and script of the report, inlined. The script sorts tables; the page is complete without it."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f4f6f8; --ink: #1b2430; --soft: #55606e; --rule: #d5dbe1;
  --dense: #8a6d2f; --moee: #1f6f9c; --static: #7a4b9c; --good: #1d6b3a; --bad: #a3262a;
  --s0: #17577b; --s1: #2b7cab; --s2: #559bc4; --s3: #84b8d7; --s4: #aed0e5; --s5: #d0e4f0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12171d; --panel: #1b222b; --ink: #e6ebf0; --soft: #a5b0bc; --rule: #36414d;
    --dense: #d3ae62; --moee: #5fb0de; --static: #c39ae0; --good: #6cc58d; --bad: #f08d8f;
    --s0: #8fcbee; --s1: #63aed8; --s2: #428cb6; --s3: #336f92; --s4: #28566f; --s5: #203f51;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.25rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
a { color: var(--moee); }
:focus-visible { outline: 3px solid var(--moee); outline-offset: 2px; }
.skip { position: absolute; left: -100rem; }
.skip:focus { position: static; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.25rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { margin: .5rem 0; max-width: 46rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; list-style: none; margin: .75rem 0; padding: 0; font-size: .95rem; }
.sub, .note, caption, .missing { color: var(--soft); }
.missing { border-left: 3px solid var(--rule); padding-left: .75rem; }
.wrap, li { overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.card { background: var(--panel); border-radius: .5rem; padding: .75rem .9rem; }
.card dt { color: var(--soft); font-size: .875rem; }
.card dd { margin: 0; }
.card .figure { font-size: 1.45rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.card .detail { color: var(--soft); font-size: .875rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .925rem; }
caption { text-align: left; max-width: calc(100vw - 2.5rem); font-size: .875rem; padding-bottom: .25rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 400; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: .15rem 0;
  cursor: pointer; text-decoration: underline dotted; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.chart { margin: .75rem 0; }
.row { display: grid; grid-template-columns: 9rem 1fr 13rem; gap: .2rem .75rem; align-items: center; font-size: .9rem; }
.row .label { overflow-wrap: anywhere; }
.row .note { font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; }
.bar { height: 1.25rem; } .bar.tall { height: 2.5rem; }
.plot { height: 9rem; border-left: 1px solid var(--rule); border-bottom: 1px solid var(--rule); }
rect.dense { fill: var(--dense); } rect.moee { fill: var(--moee); }
.span { opacity: .45; }
.tick, .mark, .line { fill: none; vector-effect: non-scaling-stroke; }
.tick { stroke-width: 1; opacity: .3; } .mark { stroke-width: 4; } .mark.thin { stroke-width: 2; } .line { stroke-width: 2.5; }
.tick.dense, .mark.dense, .line.dense { stroke: var(--dense); }
.tick.moee, .mark.moee, .line.moee { stroke: var(--moee); }
.shade { stroke: var(--page); stroke-width: 2; vector-effect: non-scaling-stroke; }
.s0 { fill: var(--s0); } .s1 { fill: var(--s1); } .s2 { fill: var(--s2); }
.s3 { fill: var(--s3); } .s4 { fill: var(--s4); } .s5 { fill: var(--s5); }
.scale { display: flex; justify-content: space-between; color: var(--soft); font-size: .8rem; }
.axis { color: var(--soft); font-size: .8rem; }
.fronts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem; margin: .75rem 0; }
.front { height: auto; max-width: 32rem; } .front text { font-size: 12px; }
.f-ink { fill: var(--ink); } .f-soft { fill: var(--soft); } .f-limit { fill: var(--bad); }
.f-name { fill: var(--ink); font-weight: 600; paint-order: stroke; stroke: var(--page); stroke-width: 3px; }
.f-grid { stroke: var(--rule); stroke-width: .75; } .f-front { fill: none; stroke: var(--soft); stroke-width: 1.5; }
.f-budget { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 5 4; }
.f-dense { fill: var(--dense); stroke: var(--dense); } .f-static { fill: var(--static); stroke: var(--static); }
.f-routed { fill: var(--moee); stroke: var(--moee); } .f-hollow { fill: var(--page); stroke-width: 2; }
.f-ring { fill: none; stroke: var(--ink); stroke-width: 2; }
.key { display: inline-block; width: .7rem; height: .7rem; margin-right: .4rem; }
.key.dense { background: var(--dense); } .key.static { background: var(--static); transform: rotate(45deg); }
.key.routed { background: var(--moee); border-radius: 50%; }
.key.line, .key.limit { height: 0; width: 1.2rem; vertical-align: middle; border-top: 2px solid var(--soft); }
.key.limit { border-top: 2px dashed var(--bad); }
.thumbs { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .75rem; margin: .75rem 0; }
.thumbs figcaption span { display: block; overflow-wrap: anywhere; }
.thumbs img { width: 6rem; image-rendering: auto; }
summary { cursor: pointer; padding: .35rem 0; overflow-wrap: anywhere; }
.strips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: .5rem; }
.strips img { width: auto; max-width: 100%; height: 2rem; image-rendering: pixelated; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1rem; list-style: none;
  margin: 0 0 .25rem; padding: 0; font-size: .875rem; }
.swatch { display: inline-block; width: .9rem; height: .3rem; margin-right: .4rem; vertical-align: middle; }
.swatch.dense { background: var(--dense); } .swatch.moee { background: var(--moee); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; background: #ffffff; border: 1px solid var(--rule); border-radius: .5rem; padding: .5rem; }
figure img { width: 100%; height: auto; }
figcaption { color: #55606e; font-size: .875rem; }
pre { background: var(--panel); border-radius: .5rem; padding: .75rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .875rem; }
@media (max-width: 40rem) {
  body { padding: .9rem; }
  .row { grid-template-columns: 1fr auto; }
  .row svg, .row .scale { grid-column: 1 / -1; grid-row: 2; }
  .row { margin-bottom: .4rem; }
}
@media print {
  :root { --page: #ffffff; --panel: #ffffff; --ink: #000000; --soft: #444444; --rule: #bbbbbb; --dense: #8a6d2f; --moee: #1f6f9c;
    --static: #7a4b9c; --bad: #a3262a;
    --s0: #17577b; --s1: #2b7cab; --s2: #559bc4; --s3: #84b8d7; --s4: #aed0e5; --s5: #d0e4f0; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, .skip { display: none; }
  .scroll, pre { overflow: visible; }
  .card { border: 1px solid var(--rule); }
  tr, .row, .card, figure { break-inside: avoid; } h2, h3 { break-after: avoid; }
  svg, .swatch { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    const body = table.tBodies[0];
    const key = (row) => row.cells[column].dataset.sort;
    const numeric = [...body.rows].every((row) => key(row) !== "" && !Number.isNaN(Number(key(row))));
    const order = (a, b) => numeric ? Number(key(a)) - Number(key(b)) : key(a).localeCompare(key(b));
    const rows = [...body.rows].sort((a, b) => down ? order(b, a) : order(a, b));
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  }));
}
"""
