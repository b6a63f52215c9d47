"""The published `tokenizer.model` of Baichuan and Baichuan2 to a tokenizer, through SentencePiece.

Two things are added to transformers' own SentencePiece class: the chat format, which the published
code has in Python and not as a template, and decoding by SentencePiece, which knows byte pieces.
"""

from itertools import groupby
from typing import Any, ClassVar

from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.tokenization_utils_base import AddedToken
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from fedfora.models.baichuan.configuration import BaichuanConfig

# The ids that published generation configs call user_token_id and assistant_token_id.
USER_ID, ASSISTANT_ID = 195, 196
# What Baichuan's vocabulary has at USER_ID; Baichuan2's has <reserved_106>.
BAICHUAN1_USER = "<reserved_102>"


class BaichuanTokenizer(SentencePieceBackend):
    """Tokenizer of Baichuan and Baichuan2, base and chat.

    The pieces that open a user's and an assistant's turn are special tokens, so the text between
    two of them is encoded alone, as the published chat functions do.

    Args:
        unk_token: Unknown token.
        bos_token: Begin of sequence; never put before a text.
        eos_token: End of sequence; never put after a text.
        pad_token: Padding.
        chat_template: Default: the published chat format, where the vocabulary has its two tokens.
        **kwargs: As for every tokenizer; `vocab_file` is the path of tokenizer.model.

    Raises:
        ValueError: If `add_bos_token` or `add_eos_token` is true.
    """

    model_input_names: ClassVar = ["input_ids", "attention_mask"]

    def __init__(
        self,
        *,
        unk_token: str | AddedToken = "<unk>",
        bos_token: str | AddedToken = "<s>",
        eos_token: str | AddedToken = "</s>",
        pad_token: str | AddedToken = "<unk>",
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("add_bos_token", "add_eos_token"):
            if kwargs.get(name):
                raise ValueError(
                    f"{name} is true, but Baichuan's tokenizer adds no token to a text: set it to "
                    "false in tokenizer_config.json"
                )
        kwargs.pop("auto_map", None)  # names the Python file that is not used
        added = kwargs.pop("added_tokens_decoder", {})
        super().__init__(
            unk_token=_plain(unk_token),
            bos_token=_plain(bos_token),
            eos_token=_plain(eos_token),
            pad_token=_plain(pad_token),
            chat_template=chat_template,
            added_tokens_decoder={index: _plain(token) for index, token in added.items()},
            **kwargs,
        )
        if self.sp_model.get_piece_size() > ASSISTANT_ID:
            user, assistant = self.sp_model.id_to_piece([USER_ID, ASSISTANT_ID])
            self.add_tokens([user, assistant], special_tokens=True)
            if chat_template is None:
                self.chat_template = _chat_template(user, assistant)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text; added and special tokens by name, for SentencePiece drops them."""
        known = self.added_tokens_encoder
        return "".join(
            "".join(group) if is_added else self.sp_model.decode(list(group))
            for is_added, group in groupby(tokens, known.__contains__)
        )


class BaiChuanTokenizer(BaichuanTokenizer):
    """The same under the spelling that Baichuan-7B's tokenizer_config.json has."""


def _plain(token: Any) -> Any:
    """Drop the published `single_word`: with it, the `</s>` of `text</s>` would not be a token."""
    if not isinstance(token, AddedToken):
        return token
    return AddedToken(
        token.content,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _chat_template(user: str, assistant: str) -> str:
    """Return the published chat format as a template.

    Baichuan-13B-Chat closes each answer with end-of-sequence and knows no system message.
    Baichuan2 takes a first system message as it is; in its published fine-tuning, only the end of
    the conversation is closed.
    """
    baichuan1 = user == BAICHUAN1_USER
    system, closed = ("false", "true") if baichuan1 else ("loop.first", "loop.last")
    return (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '" + user + "' + message['content'] }}"
        "{% elif message['role'] == 'assistant' %}{{ '" + assistant + "' + message['content'] }}"
        "{% if " + closed + " %}{{ eos_token }}{% endif %}"
        "{% elif message['role'] == 'system' and " + system + " %}{{ message['content'] }}"
        "{% else %}{{ raise_exception('the published chat format of this Baichuan has no ' "
        "+ message['role'] + ' message at position ' + loop.index|string) }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + assistant + "' }}{% endif %}"
    )


AutoTokenizer.register(
    BaichuanConfig, BaichuanTokenizer, slow_tokenizer_class=BaiChuanTokenizer, exist_ok=True
)
