"""The model card, from the finished folder alone: every number in it was measured and stands in hf_compress.json."""

from hf_compress.card.comparison import comparison
from hf_compress.card.facts import FACTS, read_facts, save_facts, versions, without_folders
from hf_compress.card.prose import prose_of
from hf_compress.card.render import render_card
from hf_compress.card.variants import variants, variants_card
from hf_compress.card.write import adopt_prose, differing_sections, note_published, write_card

__all__ = [
    "FACTS",
    "adopt_prose",
    "comparison",
    "differing_sections",
    "note_published",
    "prose_of",
    "read_facts",
    "render_card",
    "save_facts",
    "variants",
    "variants_card",
    "versions",
    "without_folders",
    "write_card",
]
