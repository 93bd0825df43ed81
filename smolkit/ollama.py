"""The `Modelfile` with which Ollama serves a GGUF file: its chat layout as a Go template, stop words, context."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from smolkit.chat import CHAT_TEMPLATE, END_OF_TEXT, IM_END

# `chat.CHAT_TEMPLATE` in the language of Go's text/template, with the variables that Ollama fills in. Ollama recognises
# tool calls in answers by what stands around `.ToolCalls` here.
GO_TEMPLATE = """
{{- $before := "" }}
{{- if or .System .Tools }}<|im_start|>system
{{ .System }}{{ if and .System .Tools }}

{{ end }}{{ if .Tools }}# Tools
<tools>
{{ range .Tools }}{{ .Function }}
{{ end }}</tools>{{ end }}<|im_end|>
{{ end }}
{{- range $i, $message := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}{{ range $j, $call := .ToolCalls }}{{ if or $message.Content $j }}
{{ end }}<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>{{ end }}{{ if not $last }}<|im_end|>
{{ end }}
{{- else if eq .Role "tool" }}
{{- if ne $before "tool" }}<|im_start|>user{{ end }}
<tool_response>
{{ .Content }}
</tool_response>
{{- if or $last (ne (index (slice $.Messages $i) 1).Role "tool") }}<|im_end|>
{{ end }}
{{- end }}
{{- if and $last (ne .Role "assistant") }}<|im_start|>assistant
{{ end }}
{{- $before = .Role }}
{{- end }}""".removeprefix("\n")
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


def modelfile(
    gguf: Path, tokenizer: PreTrainedTokenizerFast, context: int, generation: dict[str, Any] | None = None
) -> str:
    """The contents of a `Modelfile` beside `gguf`.

    context: positions the model knows, in tokens. generation: contents of generation_config.json, whose sampling
    settings are taken over. A foreign chat template is left to Ollama, which knows the common ones by their text.
    """
    lines = [f"FROM ./{gguf.name}"]
    if tokenizer.chat_template == CHAT_TEMPLATE:
        lines += [f'TEMPLATE """{GO_TEMPLATE}"""']
    else:
        lines += ["# The chat template is not this toolkit's: Ollama chooses one by the template in the GGUF file."]
    stops = [word for word in (IM_END, END_OF_TEXT) if word in tokenizer.get_vocab()]
    lines += [f"PARAMETER stop {json.dumps(word)}" for word in stops]
    lines += [f"PARAMETER num_ctx {context}"]
    for name in SAMPLING:
        value = (generation or {}).get(name)
        if value is not None:
            lines.append(f"PARAMETER {'repeat_penalty' if name == 'repetition_penalty' else name} {value:g}")
    return "\n".join(lines) + "\n"
