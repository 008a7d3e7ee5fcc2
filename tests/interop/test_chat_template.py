"""The exported chat template against our rendering: ids and supervised tokens of the written list of conversations.

Needs `pip install transformers`, without torch; skipped where it is absent.
"""

from pathlib import Path

import pytest
from helpers.messages import assistant, part, user

from nanojax.conversation import render, render_for_completion
from nanojax.interop import tokenizers
from nanojax.tokenizer import train

TEXT = "the people of this great nation have met in peace; the law will serve every state 1837 ünïté 你好 🌍\n\n x " * 9

TOOL = [part("text", "By hand 2. "), part("python", "1+1"), part("python_output", "2"), part("text", "\n\n#### 2")]
CONVERSATIONS = {
    "one turn": [user("the people"), assistant("have met")],
    "several turns": [user("a"), assistant(" b "), user("\n\n c"), assistant("d\n"), user("e"), assistant("")],
    "a system message": [{"role": "system", "content": "Be short."}, user(" hi"), assistant("no")],
    "an empty system message": [{"role": "system", "content": ""}, user("hi"), assistant("no")],
    "a tool": [user("1+1?"), assistant(TOOL), user("sure?"), assistant("yes")],
    "tools in a row": [user("?"), assistant([*TOOL[1:3], *TOOL[1:3]])],
    "no parts": [user("?"), assistant([])],
    "any script": [user("ünïté 你好 🌍"), assistant("🌍 e\u0301 \u200b 你")],
    "a question": [user("a"), assistant("b"), user("c")],
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory):
    """(our tokenizer, transformers' of the exported files)."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers to compare its templates")
    folder: Path = tmp_path_factory.mktemp("hf")
    ours = train(iter([TEXT]), 340)
    tokenizers.save_transformers(ours, folder, 64)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_and_supervised_tokens_are_ours(both, name: str) -> None:
    """apply_chat_template gives our ids, its assistant mask our mask, and its generation prompt ours."""
    ours, theirs = both
    messages = CONVERSATIONS[name]
    ids, mask = render(ours, messages)
    out = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert out["input_ids"] == ids
    assert out["assistant_masks"] == mask
    if messages[-1]["role"] == "user":
        prompt = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert prompt == render_for_completion(ours, messages)


def test_what_a_template_cannot_say(both) -> None:
    """The two stated differences: a special token's name in a message, and two text parts in a row."""
    ours, theirs = both
    named = [user("<|assistant_end|>"), assistant("a")]
    assert theirs.apply_chat_template(named, tokenize=True, return_dict=False) != render(ours, named)[0]
    parts = [user("a"), assistant([part("text", "peo"), part("text", "ple")])]
    assert theirs.apply_chat_template(parts, tokenize=True, return_dict=False) != render(ours, parts)[0]


@pytest.mark.parametrize(
    "messages", [[], [assistant("a")], [user("a"), user("b")], [{"role": "system", "content": "a"}]]
)
def test_what_is_no_conversation_is_refused(both, messages: list) -> None:
    """By the template, too."""
    with pytest.raises(Exception, match=r"begins with a user|must alternate|list index|empty"):
        both[1].apply_chat_template(messages, tokenize=True)
