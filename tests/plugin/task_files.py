"""Writes tiny lm-eval tasks of every kind, in our own sentences, for tests; loaded by its path."""

from __future__ import annotations

import json
from pathlib import Path

CHOICES = [
    {"q": "He went to the", "choices": [" house", " were"], "gold": 0},
    {"q": "She said that she would", "choices": [" of", " be"], "gold": 1},
    {"q": "There was a great deal of", "choices": [" went", " money"], "gold": 1},
    {"q": "It was one of the", "choices": [" most", " him"], "gold": 0},
    {"q": "I do not know what", "choices": [" and", " you"], "gold": 1},
    {"q": "They looked at each", "choices": [" other", " had"], "gold": 0},
    {"q": "The old man sat by the", "choices": [" fire", " because"], "gold": 0},
    {"q": "For a long", "choices": [" time", " said"], "gold": 0},
]
ENDS = [
    {"q": "They looked at each", "a": "other"},
    {"q": "It was one of the", "a": "most"},
    {"q": "He shook his", "a": "head"},
    {"q": "For a long", "a": "time"},
    {"q": "As soon as the door was", "a": "opened"},
    {"q": "She did not know what to", "a": "do"},
]
PAGES = [
    {"page": "The rain had stopped before the evening, and the road to the village was white with stones."},
    {"page": "She put the letter on the table and waited until the old clock had struck nine."},
    {"page": "No one spoke of it again, though everyone in the house had heard the carriage leave."},
]
HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
num_fewshot: 0
metadata: {{version: 0.1}}
"""
TASKS = {
    "tiny_choice": (
        CHOICES,
        """\
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    ),
    "tiny_write": (
        ENDS,
        """\
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: [" of", "\\n"], max_gen_toks: 4, do_sample: false}
filter_list: [{name: first_word, filter: [{function: regex, regex_pattern: "([A-Za-z]+)"}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    ),
    "tiny_ends": (
        ENDS,
        """\
output_type: loglikelihood
doc_to_text: "{{q}}"
doc_to_target: " {{a}}"
target_delimiter: ""
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    ),
    "tiny_pages": (
        PAGES,
        """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: page
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
    ),
}


def write_tasks(folder: Path) -> Path:
    """Write all of them with their data into a new folder."""
    folder.mkdir()
    for name, (rows, body) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, rows=data) + body, encoding="utf-8")
    return folder
