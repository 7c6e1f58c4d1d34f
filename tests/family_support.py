"""Support: what works in which family, as data, and the tests that say so.

`python -m tests.family_support` prints the tables of docs/models.md. A tick stands for collected
tests; tests/test_models_doc.py fails where a tick has none. A cross has a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tests.family_models import NAMES, VIDEO_FAMILIES
from tests.family_oracle import PADDED
from tests.test_family_methods import ANY_SIZE, DOES_NOT_APPLY, METHODS, MROPE, NOT_MASKING

TICK, CROSS, OPEN = "✓", "–", "○"
"""It works, it does not, it works where an optional package is installed."""
TITLES = {
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "internvl": "InternVL",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "gemma3": "Gemma 3",
    "paligemma": "PaliGemma",
    "paligemma_2": "PaliGemma 2",
}
"""Names of the tests' tiny models -> what people call them, in the order of the tables."""
ORACLES, GENERATE = "tests/test_family_oracles.py", "tests/test_family_generate.py"
SCORES, VIDEO = "tests/test_family_scores.py", "tests/test_family_video.py"
EXACT, ANSWERS = "tests/test_family_methods.py", "tests/test_family_method_answers.py"
TRAINING, PROCESSORS = "tests/train/test_families.py", "tests/test_processors.py"
DOCTOR, BENCH = "tests/cli/test_doctor.py", "tests/test_bench.py"
FILES = (ORACLES, GENERATE, SCORES, VIDEO, EXACT, ANSWERS, TRAINING, PROCESSORS, DOCTOR, BENCH)
LLAVA, RUNS = "tests/test_method_oracles.py", "tests/train/test_run.py"
INFER, MERGE = "tests/cli/test_infer.py", "tests/cli/test_merge_calibrate.py"
FILES += (LLAVA, RUNS, INFER, MERGE)
OLDEST = (ORACLES, GENERATE, SCORES, VIDEO, EXACT, ANSWERS)
"""What `make test-oldest` has to run for a tick in the row of the oldest transformers."""

NO_VIDEO = "the model takes images only"
FRAMES_ARE_IMAGES = "a frame is an image to this model, with a budget of its own"
NEEDS_TORCHVISION = (
    "the test runs where torchvision is installed, which the part of the processor for videos "
    "needs, and is skipped elsewhere; without it the error says so, and the model itself needs none"
)
TORCHVISION = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm")
"""Families whose processor cannot be made without that package."""
SAME_CLASSES = "not tried: the classes and the processor are PaliGemma's; only the decoder differs"


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    title: str
    tests: tuple[str, ...]
    """`file::function`, run with the family among its parameters."""
    also: tuple[str, ...] = ()
    """Further parameters: there is a run with each of them, too."""
    instead: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Family -> its tests, where they do not have it among their parameters; brackets pick one."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Family -> what to know of its tick."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """Family -> what its tests need to run."""
    crosses: Mapping[str, str] = field(default_factory=dict)
    """Family -> why not."""
    refusal: str = ""
    """How tests start that crosses are refused with a sentence; empty: nothing to refuse."""


def for_all(names: Iterable[str], text: str) -> dict[str, str]:
    return dict.fromkeys(names, text)


WITHOUT_VIDEO = {
    **for_all(set(NAMES) - set(VIDEO_FAMILIES), NO_VIDEO),
    **for_all(("internvl", "idefics3", "smolvlm"), FRAMES_ARE_IMAGES),
}
BY_PROCESSOR = {"paligemma_2": SAME_CLASSES}
PLAIN_MASK = "rows are padded to the longest: masks say more than which tokens are padding"

FEATURES = (
    Row(
        "`keep: 1.0` and `detach()` are the bare model, bit for bit",
        (
            f"{ORACLES}::test_keep_one_is_the_bare_model",
            f"{ORACLES}::test_detach_restores_the_model_bit_for_bit",
        ),
    ),
    Row(
        "training: loss and all gradients equal masking",
        (f"{ORACLES}::test_dropping_equals_masking",),
        also=("stage1", "stage2", "both"),
    ),
    Row(
        "`generate` equals a loop over the masked model",
        (f"{GENERATE}::test_generate_equals_the_masked_reference",),
    ),
    Row(
        "several images a row, text-only rows: a batch is its rows",
        (f"{ORACLES}::test_a_batch_is_its_rows",),
    ),
    Row(
        "batches of text alone are untouched",
        (
            f"{ORACLES}::test_a_batch_of_text_alone_is_untouched",
            f"{GENERATE}::test_a_text_only_prompt_is_untouched",
        ),
    ),
    Row(
        "padding on the left and on the right",
        (f"{ORACLES}::test_dropping_equals_masking",),
        also=("left", "right"),
    ),
    Row(
        "packed rows: no padding is computed",
        (f"{ORACLES}::test_later_layers_really_see_fewer_tokens",),
        crosses=for_all(PADDED, PLAIN_MASK),
    ),
    Row("beams", (f"{GENERATE}::test_beams_equal_the_masked_reference",)),
    Row(
        "a second turn on the pruned cache",
        (f"{GENERATE}::test_a_second_turn_continues_the_pruned_cache",),
    ),
    Row("prompt-lookup decoding", (f"{GENERATE}::test_assisted_decoding_says_the_same",)),
    Row(
        "gradient checkpointing",
        (f"{ORACLES}::test_checkpointing_changes_no_gradient",),
        notes={
            "qwen3_vl": "with transformers 5.17 the non-reentrant kind, which is the default; the "
            "other raises an error there"
        },
    ),
    Row(
        "bfloat16 autocast",
        (f"{ORACLES}::test_bfloat16_autocast_trains",),
        notes={"smolvlm": "not with transformers 5.17, whose bare model cannot"},
    ),
    Row(
        "scores equal the encoder's own attention",
        (f"{SCORES}::test_the_tapped_score_is_eager_attention",),
    ),
    Row(
        "scores are pooled as features are (Jacobian)",
        (f"{SCORES}::test_scores_are_pooled_like_features",),
        crosses={"llava": "nothing is pooled: a token is a patch"},
    ),
    Row(
        "videos, a budget a frame",
        (f"{VIDEO}::test_every_frame_has_its_budget", f"{VIDEO}::test_a_video_may_have_one_frame"),
        crosses=WITHOUT_VIDEO,
    ),
    Row(
        "videos, a budget a clip",
        (
            f"{VIDEO}::test_a_clip_shares_its_budget",
            f"{VIDEO}::test_a_batch_with_clips_is_its_rows",
        ),
        crosses=WITHOUT_VIDEO,
    ),
    Row(
        "`positions: contiguous`",
        (f"{EXACT}::test_contiguous_positions_are_a_short_prompt",),
        instead={"llava": (f"{LLAVA}::test_contiguous_positions_are_a_short_prompt",)},
        crosses=for_all(MROPE, "refused: a token has three position ids here"),
        refusal=f"{EXACT}::test_ids_of_three_axes_stay",
    ),
    Row(
        "real processor: batches of questions (`itprune infer`)",
        (f"{PROCESSORS}::test_a_batch_is_answered_like_its_questions",),
        crosses=BY_PROCESSOR,
        optional=for_all(TORCHVISION, NEEDS_TORCHVISION),
    ),
    Row(
        "real processor: training from a recipe, then infer, merge, calibrate",
        (f"{TRAINING}::test_pruned_adapters_train_infer_merge_and_calibrate",),
        crosses=BY_PROCESSOR,
        optional=for_all(TORCHVISION, NEEDS_TORCHVISION),
        instead={
            "llava": (
                f"{RUNS}::test_a_pruned_run_logs_what_was_kept_and_saves_the_pruner",
                f"{INFER}::test_an_answer_and_its_cost",
                f"{MERGE}::test_a_merged_folder_answers_alike",
                f"{MERGE}::test_calibrate_makes_an_ordinary_folder_meet_its_target",
            )
        },
    ),
    Row(
        "`itprune doctor`",
        (f"{DOCTOR}::test_every_family_is_described",),
        crosses=BY_PROCESSOR,
        optional=for_all(TORCHVISION, NEEDS_TORCHVISION),
        instead={"llava": (f"{DOCTOR}::test_the_default_method_acts_in_two_stages",)},
    ),
    Row(
        "a shape of `itprune bench`",
        (),
        crosses=for_all(
            set(NAMES) - {"llava", "llava_next", "qwen2_5_vl"},
            "no shape of this family; time depends on the sizes of tower and language model, not "
            "on the family's file",
        ),
        instead={
            "llava": (f"{BENCH}::test_infer_stores_what_the_report_says[tiny]",),
            "llava_next": (f"{BENCH}::test_infer_stores_what_the_report_says[next-like]",),
            "qwen2_5_vl": (f"{BENCH}::test_infer_stores_what_the_report_says[qwen2.5-vl-like]",),
        },
    ),
    Row(
        "transformers 5.17 (`make test-oldest`)",
        (
            f"{ORACLES}::test_dropping_equals_masking",
            f"{GENERATE}::test_generate_equals_the_masked_reference",
            f"{ANSWERS}::test_every_method_answers",
        ),
    ),
)
OLDEST_ROW = FEATURES[-1]

SHRINKS = ("llava", "qwen2_vl", "qwen2_5_vl")
METHOD_NOTES = {
    "downsample": {
        **for_all(
            NAMES, "finished tokens are averaged to a smaller grid; the encoder takes one size"
        ),
        **for_all(
            SHRINKS, "the picture itself is made smaller, so that the encoder saves time, too"
        ),
    },
    "sparsevlm": for_all(NAMES, f"counted, not compared with masking: {NOT_MASKING['sparsevlm']}"),
    "yopo": {
        **for_all(NAMES, f"counted, not compared with masking: {NOT_MASKING['yopo']}"),
        **for_all(
            ANY_SIZE, "likewise, and `window` has to be null: grids differ from image to image"
        ),
    },
}


def method_row(method: str) -> Row:
    """Ticks of one method: what it drops is gone, it trains, and it generates."""
    if method == "dense":
        return Row("`dense`", (f"{ANSWERS}::test_dense_changes_nothing",))
    answers = f"{ANSWERS}::test_every_method_answers"
    known = (
        f"{LLAVA}::test_a_batch_is_its_rows",
        f"{LLAVA}::test_generate_is_a_loop_without_a_cache",
    )
    return Row(
        f"`{method}`",
        (f"{EXACT}::test_what_is_dropped_is_gone", f"{EXACT}::test_a_step_trains", answers),
        also=(method,),
        instead={"llava": (f"{answers}[llava-{method}]", *(f"{test}[{method}]" for test in known))},
        notes=METHOD_NOTES.get(method, {}),
        crosses={name: why for (name, found), why in DOES_NOT_APPLY.items() if found == method},
        refusal=f"{EXACT}::test_methods_that_",
    )


METHOD_ROWS = tuple(method_row(method) for method in sorted([*METHODS, "dense"]))
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def table(corner: str, rows: tuple[Row, ...], first: int) -> tuple[str, list[str]]:
    """A Markdown table, and the reasons and notes it refers to.

    Args:
        corner: over the rows' titles.
        rows: of the table.
        first: number of the first note.
    """
    notes: list[str] = []

    def cell(row: Row, name: str) -> str:
        text = row.crosses.get(name) or row.optional.get(name) or row.notes.get(name)
        mark = CROSS if name in row.crosses else OPEN if name in row.optional else TICK
        if text is None:
            return mark
        if text not in notes:
            notes.append(text)
        return mark + str(first + notes.index(text)).translate(SUPERSCRIPTS)

    lines = [f"| {corner} | " + " | ".join(TITLES.values()) + " |"]
    lines.append("|---|" + ":-:|" * len(TITLES))
    for row in rows:
        lines.append(f"| {row.title} | " + " | ".join(cell(row, name) for name in TITLES) + " |")
    return "\n".join(lines), notes


def rendered() -> str:
    """Both tables and their notes, as docs/models.md has them."""
    features, first = table("feature", FEATURES, 1)
    methods, later = table("method", METHOD_ROWS, 1 + len(first))
    notes = [f"{number}. {text}." for number, text in enumerate([*first, *later], 1)]
    return "\n\n".join([features, methods, "\n".join(notes)])


if __name__ == "__main__":
    print(rendered())
