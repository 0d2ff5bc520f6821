"""What a module hands over when it is evaluated by generation."""

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class EvalSample:
    """One generated answer beside what was asked.

    Attributes:
        prompt: What the model was given, as text.
        reference: The answer that was wanted.
        output: The answer that came.
        scores: Per-sample scores by measure; proportions as 0.0 or 1.0. A measure that does not
            apply to this sample is left out, so that means run over the samples that it applies to.
    """

    prompt: str
    reference: str
    output: str
    scores: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain types, ready for a line of jsonl."""
        return asdict(self)
