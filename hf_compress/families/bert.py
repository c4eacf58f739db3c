"""BERT-shaped encoders."""

from hf_compress.families import Family, add_family

add_family(
    Family(
        name="bert",
        model_types=("bert", "roberta"),
        blocks="encoder.layer",
        attention=(
            ("attention.self.query", "attention.self.key", "attention.self.value"),
            ("attention.output.dense",),
        ),
        qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
        up=("intermediate.dense",),
        down="output.dense",
        per_layer_fields=(),
        residuals=("attention.self.query", "intermediate.dense"),
        scaled_by=("", "", ""),  # its norms feed the residual stream too
    ),
    summary="BERT, MiniLM, RoBERTa: encoders with a two-matrix FFN",
    paper="https://arxiv.org/abs/1810.04805",
)
