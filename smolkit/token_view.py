"""Tokens as coloured text, in HTML that brings its own style and needs no script: for the app and for notebooks."""

import html
from collections.abc import Iterable, Sequence

from smolkit.clients import Token

# One hue from red (improbable) to green (certain); translucent, so that it works on white and on black.
STYLE = """<style>
.tokens {position: relative; font: 0.95rem/2.1 ui-monospace, "Noto Sans Mono CJK SC", monospace;
  overflow-wrap: anywhere}
.tokens.probable {padding-bottom: 11em}
.tokens.probable .text {max-height: 17em; overflow-y: auto}
.tokens .token {padding: 0.15em 0; border-radius: 0.2em; white-space: pre-wrap; cursor: default;
  border-right: 1px solid rgba(128, 128, 128, 0.45)}
.tokens .token:hover, .tokens .token:focus {outline: 1.5px solid currentColor}
.tokens .others, .tokens .hint {position: absolute; left: 0; bottom: 0; height: 10em; font-size: 0.85rem;
  line-height: 1.6}
.tokens .others {display: none; grid-template-columns: auto 4em 12em; column-gap: 1em; align-content: start;
  align-items: center; min-width: 60%}
.tokens .token:hover .others, .tokens .token:focus .others {display: grid}
.tokens:has(.token:hover) .hint, .tokens:has(.token:focus) .hint {display: none}
.tokens:has(.token:hover) .token:focus:not(:hover) .others {display: none}
.tokens .others b {font-weight: 400; text-align: right}
.tokens .others .chosen {font-weight: 700}
.tokens .others i {height: 0.6em; border-radius: 0.3em; background: #4c8bf5}
.tokens .hint {opacity: 0.6}
.tokens-scale {display: flex; gap: 0.6em; align-items: center; font-size: 0.8rem; opacity: 0.85}
.tokens-scale i {width: 8em; height: 0.7em; border-radius: 0.35em;
  background: linear-gradient(90deg, hsla(0, 75%, 50%, 0.45), hsla(60, 75%, 50%, 0.45), hsla(120, 75%, 50%, 0.45))}
</style>"""
SCALE = '<div class="tokens-scale">0 %<i></i>100 %</div>'
HINT = '<span class="hint">point at a token · 把鼠标放在词元上</span>'


def probabilities_html(tokens: Sequence[Token]) -> str:
    """Every token coloured by its probability; below, the most probable tokens in the place of the one pointed at."""
    if not tokens:
        return ""
    hint = HINT if any(token.alternatives for token in tokens) else ""
    text = "".join(map(_with_alternatives, tokens))
    return f'{STYLE}{SCALE}<div class="tokens probable"><div class="text">{text}</div>{hint}</div>'


def mask_html(texts: Iterable[str], mask: Iterable[int]) -> str:
    """Every token's text, green where `mask` is 1 (trained on) and grey where it is 0."""
    colours = ("hsla(140, 70%, 45%, 0.4)" if trained else "transparent" for trained in mask)
    return f'{STYLE}<div class="tokens">{"".join(map(_span, texts, colours))}</div>'


def _with_alternatives(token: Token) -> str:
    ranked = list(token.alternatives)
    if ranked and token.text not in dict(ranked):
        ranked.append((token.text, token.probability))  # sampled, though not among the most probable
    rows = "".join(
        f'<span{" class=chosen" if text == token.text else ""}>{visible(text)}</span><b>{probability:.1%}</b>'
        f'<i style="width: {probability:.1%}"></i>'
        for text, probability in ranked
    )
    others = f'<span class="others">{rows}</span>' if rows else ""
    return _span(token.text, f"hsla({120 * token.probability:.0f}, 75%, 50%, 0.45)", others, f"{token.probability:.1%}")


def _span(text: str, colour: str, others: str = "", title: str = "") -> str:
    attributes = f' tabindex="0" aria-label="{visible(text)} {title}"' if title else ""
    return f'<span class="token"{attributes} style="background: {colour}">{visible(text)}{others}</span>{_breaks(text)}'


def visible(text: str) -> str:
    """Escaped, with the signs for what cannot be seen."""
    return html.escape(text).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·") or "∅"


def _breaks(text: str) -> str:
    return "<br>" * text.count("\n")
