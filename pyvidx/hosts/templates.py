"""What the published chat models were trained to read, to the character.

A question and its video become one text, with VIDEO where the video's tokens go; the tokens themselves are put there by
who knows how many there are. Every template is also a Jinja template, for the tokenizers of transformers.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

VIDEO = "<video>"


@dataclass(frozen=True)
class Template:
    """One conversation format.

    Args:
        system: what it starts with, up to the first question.
        user, assistant: before a question and before an answer.
        user_end, assistant_end: after them.
        asked: in place of `assistant`, where the answer is to come.
        video: how VIDEO is joined to the question about it, with {question} and {video}.
        stop: texts at which an answer ends, beside the tokenizer's eos.
        note: who uses it.
    """

    system: str
    user: str
    assistant: str
    user_end: str
    assistant_end: str
    asked: str
    video: str
    stop: tuple[str, ...] = ()
    note: str = ""

    def prompt(self, question: str, history: Sequence[tuple[str, str]] = (), *, answer: str | None = None) -> str:
        """A conversation about one video, which is shown at its first question.

        Args:
            question: the newest one.
            history: (question, answer) of those before.
            answer: its answer, for training; None: it is to come.

        Raises:
            ValueError: a question or an answer holds VIDEO, which would be taken for a second video.
        """
        text, turns = self.system, [*history, (question, answer)]
        for i, (asked, told) in enumerate(turns):
            if VIDEO in asked or VIDEO in (told or ""):
                raise ValueError(
                    f"Template: no text may hold {VIDEO}, which the template puts there: {asked!r} {told!r}"
                )
            text += self.user + (asked if i else self.video.format(question=asked, video=VIDEO)) + self.user_end
            text += self.asked if told is None else self.assistant + told + self.assistant_end
        return text

    def jinja(self) -> str:
        """The same for apply_chat_template, of messages {"role": "user" or "assistant", "content": ...}, where content
        is a text, or a list of {"type": "text", "text": ...} and {"type": "video"}."""
        before, between, after = self.video.replace("{video}", "{question}").split("{question}")
        first = "text" if self.video.index("{question}") < self.video.index("{video}") else "video"
        parts = {"text": "text.value", "video": _quoted(VIDEO)}
        second = "video" if first == "text" else "text"
        joined = " + ".join([_quoted(before), parts[first], _quoted(between), parts[second], _quoted(after)])
        return (
            "{{- " + _quoted(self.system) + " -}}"
            "{%- for message in messages -%}"
            "{%- set text = namespace(value='', video=false) -%}"
            "{%- if message['content'] is string -%}{%- set text.value = message['content'] -%}"
            "{%- else -%}{%- for part in message['content'] -%}"
            "{%- if part['type'] == 'video' -%}{%- set text.video = true -%}"
            "{%- elif part['type'] == 'text' -%}{%- set text.value = text.value + part['text'] -%}"
            "{%- else -%}{{- raise_exception('content must be text or video, got ' + part['type']) -}}{%- endif -%}"
            "{%- endfor -%}{%- endif -%}"
            "{%- if message['role'] == 'user' -%}"
            "{%- if text.video -%}{{- " + _quoted(self.user) + " + " + joined + " + " + _quoted(self.user_end) + " -}}"
            "{%- else -%}{{- " + f"{_quoted(self.user)} + text.value + {_quoted(self.user_end)}" + " -}}{%- endif -%}"
            "{%- elif message['role'] == 'assistant' -%}"
            "{{- " + f"{_quoted(self.assistant)} + text.value + {_quoted(self.assistant_end)}" + " -}}"
            "{%- else -%}{{- raise_exception('a role must be user or assistant, got ' + message['role']) -}}"
            "{%- endif -%}"
            "{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{- " + _quoted(self.asked) + " -}}{%- endif -%}"
        )


def _quoted(text: str) -> str:
    """A string literal of Jinja."""
    return json.dumps(text, ensure_ascii=False)


_VICUNA = {
    "user": "USER: ", "assistant": "ASSISTANT: ", "user_end": " ", "assistant_end": "</s>", "asked": "ASSISTANT:",
    "video": "{question}\n{video}",
}  # fmt: skip
_MINIGPT4 = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)

TEMPLATES: dict[str, Template] = {
    # No space before "Follow": so it was evaluated.
    "video-chatgpt_v1": Template(
        system="You are Video-ChatGPT, a large vision-language assistant. You are able to understand the video content "
        "that the user provides, and assist the user with a variety of tasks using natural language.Follow the "
        "instructions carefully and explain your answers in detail based on the provided video. ",
        **_VICUNA,
        note="BT-Adapter on LLaVA, as its scripts evaluate it",
    ),
    "vicuna_v1_1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. ",
        **_VICUNA,
        note="BT-Adapter on LLaVA in instruction tuning; LLaVA and Vicuna 1.1 and later",
    ),
    "minigpt4_vicuna0": Template(
        system=_MINIGPT4 + "###",
        user="Human: ",
        assistant="Assistant: ",
        user_end="###",
        assistant_end="###",
        asked="Assistant: ",
        video="<Img>{video}</Img> {question}",
        stop=("###",),
        note="MiniGPT-4 on Vicuna 0, as of its release for LLaMA-2; before it there was no space after the last colon",
    ),
    "minigpt4_llama2": Template(
        system=_MINIGPT4,
        user="<s>[INST] ",
        assistant=" [/INST] ",
        user_end="",
        assistant_end="",
        asked=" [/INST] ",
        video="<Img>{video}</Img> {question}",
        note="MiniGPT-4 on LLaMA-2-chat",
    ),
}


def template(name: str) -> Template:
    """The template of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in TEMPLATES:
        raise ValueError(f"template: it must be one of {', '.join(TEMPLATES)}, got {name!r:.100}")
    return TEMPLATES[name]
