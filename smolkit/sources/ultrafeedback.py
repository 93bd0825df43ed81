"""openbmb/UltraFeedback: several models' answers to one instruction, each with an overall score.

{"source": str, "instruction": str, "completions": [{"response": str, "overall_score": float | str, …}, …]}
Binarised: chosen is the best overall score (the first of several), rejected is drawn from the strictly lower
ones. The revision is the one that corrected 2,628 wrong scores of 10. Rows of source `truthful_qa` are left
out: that dataset is an evaluation set."""

import hashlib
import random

from smolkit.sources.base import Rejected, RowContext, Source, as_number, pair_record


def convert(row: dict, context: RowContext) -> dict:
    if row["source"] == "truthful_qa":
        raise Rejected("source truthful_qa is an evaluation set")
    answers = [c for c in row["completions"] if (c.get("response") or "").strip()]
    rated = [(as_number(c.get("overall_score")), c["response"]) for c in answers]
    scored = [(score, text) for score, text in rated if score is not None]
    if len(scored) < 2:
        raise Rejected("fewer than two scored answers")
    best, chosen = max(scored, key=lambda pair: pair[0])
    lower = [text for score, text in scored if score < best]
    if not lower:
        raise Rejected("all answers have the same score")
    # Drawn from the seed and the row's own text, so that it does not depend on the order of files.
    digest = hashlib.blake2b(f"{context.seed}\n{row['instruction']}".encode(), digest_size=8).digest()
    rejected = random.Random(digest).choice(lower)
    identifier = f"ultrafeedback-{context.stem}-{context.index}"
    return pair_record("ultrafeedback", identifier, row["instruction"] or "", chosen, rejected)


SOURCE = Source(
    repo="openbmb/UltraFeedback",
    part="dpo",
    columns={"source": (str,), "instruction": (str,), "completions": (list,)},
    convert=convert,
    train=("*.jsonl",),
    revision="40b436560ca83a8dba36114c22ab3c66e43f6d5e",
    default=True,
    licence="MIT",
    size="about 64,000 instructions, four answers each",
)
