"""The look of the report: its style sheet, and the colours of a token's confidence."""

CONFIDENCE_LEVELS = 10  # classes c0 ... c10
_UNSURE, _SURE = (255, 255, 255), (108, 176, 226)  # light enough for dark text on both ends


def _confidence_rules() -> str:
    rules = []
    for level in range(CONFIDENCE_LEVELS + 1):
        share = level / CONFIDENCE_LEVELS
        mixed = [round(a + (b - a) * share) for a, b in zip(_UNSURE, _SURE, strict=True)]
        rules.append(f".c{level} {{ background: rgb({mixed[0]}, {mixed[1]}, {mixed[2]}); }}")
    return "\n".join(rules)


STYLE_SHEET = (
    """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: #242a30;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
header { margin-bottom: 28px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 14px; }
h3 { font-size: 14px; margin: 18px 0 6px; color: #4a535c; }
.summary { margin: 0; color: #5b6570; }
section { background: #fff; border: 1px solid #e3e7eb; border-radius: 10px; padding: 20px 22px;
  margin-bottom: 20px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0 0; }
.tiles div { background: #fff; border: 1px solid #e3e7eb; border-radius: 10px; padding: 10px 16px; }
.tiles dt { font-size: 12.5px; color: #5b6570; }
.tiles dd { margin: 0; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 18px 22px; }
.plots figure { margin: 0; }
.plots .wide { grid-column: 1 / -1; }
.plots svg { display: block; width: 100%; height: auto; }
figcaption, .note { font-size: 12.5px; color: #5b6570; margin: 4px 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
.figures { width: 100%; margin-top: 16px; font-size: 13.5px; font-variant-numeric: tabular-nums; }
.figures th, .figures td { padding: 5px 8px; text-align: right; white-space: nowrap; }
.figures th { font-weight: 500; }
.figures thead th { font-size: 12.5px; color: #5b6570; border-bottom: 2px solid #d5dbe1; white-space: normal;
  vertical-align: bottom; }
.figures tr > :first-child { text-align: left; padding-left: 0; }
.figures tbody tr { border-bottom: 1px solid #edf0f3; }
.figures .control { color: #69737d; }
.figures .reference { background: #f1f6fb; }
.figures .reference > * { font-weight: 600; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 0 28px;
  align-items: start; }
.samples > :nth-child(2) { position: sticky; top: 16px; }
.samples h3:first-child { margin-top: 0; }
blockquote { margin: 0 0 8px; padding: 8px 12px; background: #f8f9fb; border-left: 3px solid #cfd8e1;
  font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.legend { font-size: 12.5px; color: #5b6570; margin: 0 0 12px; }
.legend span { display: inline-block; padding: 1px 6px; color: #242a30; border: 1px solid #e3e7eb;
  margin-left: -1px; font-variant-numeric: tabular-nums; }
.trajectory th { font-size: 12px; font-weight: 500; color: #5b6570; text-align: right; vertical-align: top;
  padding: 4px 12px 4px 0; white-space: nowrap; }
.trajectory td { padding: 4px 0;
  font: 12.5px/1.6 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: break-spaces; overflow-wrap: anywhere; }
.trajectory tr { border-bottom: 1px solid #edf0f3; }
.config th, .config td { text-align: left; padding: 3px 24px 3px 0; font-size: 13.5px; vertical-align: top; }
.config th { font-weight: 500; color: #5b6570; }
@media (max-width: 720px) { .plots { grid-template-columns: 1fr; } main { padding: 20px 12px; } }
"""
    + _confidence_rules()
    + "\n"
)
