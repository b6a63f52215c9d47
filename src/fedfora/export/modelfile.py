"""What Ollama is told of an adapter: its base, its file, and the prompt it was trained with.

The format is Ollama's (https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx).
"""

from fedfora.data.encoding import PromptFormat


def modelfile(adapter: str, base: str | None, prompts: PromptFormat | None) -> str:
    """Return the text of a Modelfile.

    Args:
        adapter: The GGUF adapter, beside the Modelfile.
        base: The base as a GGUF file; None leaves a name to be filled in.
        prompts: The prompt format that was trained. A chat template is the base's own, which its
            GGUF file holds.
    """
    lines = [
        "# ollama create NAME -f Modelfile; ollama run NAME",
        *([] if base else ["# FROM: the base model as a GGUF file, or its name at Ollama"]),
        f"FROM {base or './base.gguf'}",
        f"ADAPTER ./{adapter}",
        "PARAMETER temperature 0",
    ]
    if prompts is not None:
        lines.append(f"PARAMETER num_predict {prompts.max_target_length}")
        if prompts.template == "plain":
            lines.append(f'TEMPLATE """{prompts.source_prefix}{{{{ .Prompt }}}}"""')
    return "\n".join(lines) + "\n"
