"""Measures the exact-match accuracy of the demo model on held-out cases, with transformers.

Run as ``python -m minisgl.demo_model.evaluate``. Half of the cases come after one to four turns of
other conversation, as they would in a chat.
"""

from __future__ import annotations

import argparse
import pathlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from . import calendar_tasks, copy_tasks, demo_model_dir, letter_tasks, names, tasks
from .tasks import Task, Turn
from .text_generator import other_turn


@dataclass(frozen=True)
class Case:
    """Earlier turns, the request that is checked, and the one right answer."""

    history: list[Turn]
    turn: Turn

    def messages(self) -> list[dict[str, str]]:
        """Return the chat messages that lead up to the answer."""
        messages: list[dict[str, str]] = []
        for turn in self.history:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.assistant})
        return [*messages, {"role": "user", "content": self.turn.user}]


CaseMaker = Callable[[random.Random], Case]


def small_history(rng: random.Random, chinese: bool, turns: int) -> list[Turn]:
    """Draw earlier turns from the training side of the hold-out."""
    return [other_turn(rng, chinese, None) for _ in range(turns)]


def task_case(task: Task, chinese: bool) -> CaseMaker:
    """Return a maker of held-out cases of a task."""

    def make(rng: random.Random) -> Case:
        turns = rng.choice((0, 0, 0, 0, 1, 2, 3, 4))
        return Case(small_history(rng, chinese, turns), task(rng, True))

    return make


def memory_case(chinese: bool) -> CaseMaker:
    """Return a maker of cases that ask for a held-out name given up to five turns before."""

    def make(rng: random.Random) -> Case:
        name = names.draw_name(rng, chinese, True)
        history = small_history(rng, chinese, rng.choice((0, 0, 1)))
        history.append(names.give_name(rng, chinese, name, None))
        history += small_history(rng, chinese, rng.randrange(6))
        return Case(history, names.ask_name(rng, chinese, name))

    return make


def greeting_case(chinese: bool) -> CaseMaker:
    """Return a maker of cases in which a held-out name is given and greeted back."""

    def make(rng: random.Random) -> Case:
        name = names.draw_name(rng, chinese, True)
        history = small_history(rng, chinese, rng.choice((0, 0, 1, 2)))
        return Case(history, names.give_name(rng, chinese, name, None))

    return make


def unknown_name_case(chinese: bool) -> CaseMaker:
    """Return a maker of cases that ask for a name nobody gave."""

    def make(rng: random.Random) -> Case:
        history = small_history(rng, chinese, rng.randrange(5))
        return Case(history, names.ask_name(rng, chinese, None))

    return make


CASE_MAKERS: dict[str, CaseMaker] = {
    "addition": task_case(tasks.addition, False),
    "addition, Chinese": task_case(tasks.addition_zh, True),
    "counting": task_case(tasks.counting, False),
    "counting, Chinese": task_case(tasks.counting_zh, True),
    "counting down": task_case(tasks.counting_down, False),
    "counting down, Chinese": task_case(tasks.counting_down_zh, True),
    "spelling": task_case(letter_tasks.spelling, False),
    "spelling, Chinese": task_case(letter_tasks.spelling_zh, True),
    "reversing": task_case(letter_tasks.reversing, False),
    "reversing, Chinese": task_case(letter_tasks.reversing_zh, True),
    "counting letters": task_case(letter_tasks.letter_count, False),
    "days": task_case(calendar_tasks.day_order, False),
    "days, Chinese": task_case(calendar_tasks.day_order_zh, True),
    "months": task_case(calendar_tasks.month_order, False),
    "months, Chinese": task_case(calendar_tasks.month_order_zh, True),
    "repeating": task_case(copy_tasks.repeating, False),
    "repeating, Chinese": task_case(copy_tasks.repeating_zh, True),
    "greeting a new name": greeting_case(False),
    "greeting a new name, Chinese": greeting_case(True),
    "remembering a name": memory_case(False),
    "remembering a name, Chinese": memory_case(True),
    "no name given": unknown_name_case(False),
    "no name given, Chinese": unknown_name_case(True),
}


def make_cases(task: str, count: int, seed: int) -> list[Case]:
    """Return held-out cases of a task, the same ones for the same seed."""
    rng = random.Random(f"{seed} {task}")
    return [CASE_MAKERS[task](rng) for _ in range(count)]


@torch.inference_mode()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: list[Case], batch_size: int) -> list[str]:
    """Return the greedy answers, batching cases of similar length."""
    prompts = [
        tokenizer.apply_chat_template(case.messages(), add_generation_prompt=True, tokenize=False) for case in cases
    ]
    order = sorted(range(len(cases)), key=lambda index: len(cases[index].turn.assistant))
    answers = [""] * len(cases)
    generate = cast(Callable[..., torch.Tensor], model.generate)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = tokenizer(
            [prompts[index] for index in batch],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(model.device)
        # A wrong answer may run on; a right one is never longer than the expected answer.
        expected = [cases[index].turn.assistant for index in batch]
        limit = max(len(ids) for ids in tokenizer(expected)["input_ids"]) + 4
        output = generate(**inputs, max_new_tokens=limit, do_sample=False)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text
    return answers


def load(folder: pathlib.Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train(False)
    return model, AutoTokenizer.from_pretrained(folder)


def main() -> None:
    """Print the accuracy of every task, and some of the failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, default=demo_model_dir())
    parser.add_argument("--cases", type=int, default=200, help="cases of each task")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--show-failures", type=int, default=0, help="failures shown of each task")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    model.to(arguments.device)
    print("| task | held-out cases | exact |")
    print("| --- | ---: | ---: |")
    for task in CASE_MAKERS:
        cases = make_cases(task, arguments.cases, arguments.seed)
        answers = answer(model, tokenizer, cases, arguments.batch_size)
        failures = [(case.turn, text) for case, text in zip(cases, answers, strict=True) if text != case.turn.assistant]
        share = 100 * (1 - len(failures) / len(cases))
        print(f"| {task} | {len(cases)} | {share:.1f} % |", flush=True)
        for turn, text in failures[: arguments.show_failures]:
            print(f"    {turn.user!r}\n      wanted {turn.assistant!r}\n      got    {text!r}")


if __name__ == "__main__":
    main()
