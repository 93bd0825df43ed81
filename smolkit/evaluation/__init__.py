"""What a model answers, how sure it is, and what may be concluded from it.

`subjects` and `endpoint` ask (a checkpoint here, or any OpenAI-compatible server); `exam`, `generation` and
`likelihoods` are the measurements, `harness` those of lm-evaluation-harness; `lengths` checks beforehand that the items
fit; `results` turns them into figures with confidence intervals by `statistics` and writes them, and `comparison` sets
runs side by side.

An evaluation directory holds

- `metrics.json`: the figures by name (null: it was not finite), their number of items as `NAME_n`; `"intervals"`:
  `{NAME: [low, high]}`, 95 % confidence; `"shares"`: the names of figures that are shares, of items or expected ones;
  `"data"` and `"checksums"`: the file that a figure was measured on; `"settings"`: what was asked and of whom;
- `items.jsonl`: `{"id": str, "values": {NAME: value}}`, the items that the figures are made of: true or false, a
  number, or [numerator, denominator] for a ratio of sums;
- `metrics.md`: the same figures as a Markdown table;
- `answers.jsonl` (exam), `replies.jsonl` (generation tasks) and `samples.jsonl` (prompts of pairs): the texts.
"""
