"""What may be asked: the body of `POST /v1/completions`. Needs the extra `serve`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

LARGEST_SEED = 2**63 - 1
Text = Annotated[str, Field(max_length=1 << 18)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]


class StreamOptions(BaseModel):
    """As OpenAI's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class CompletionRequest(BaseModel):
    """OpenAI's completion request, with `num_steps`, `sampler`, `noise`, `infill` and `trajectory` besides.

    Null stands for what is left out. What OpenAI has and a flow has not is accepted at the value that means nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Text | None = None
    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]] | None = None
    suffix: Text | None = Field(None, description="What follows the text that is written.")
    infill: Text | None = Field(None, description="A text with blanks, [[N]] for N tokens, instead of a prompt.")
    max_tokens: int | None = Field(None, ge=0, description="Tokens to write; 16.")
    n: int | None = Field(None, ge=1, description="Texts of each prompt; 1.")
    seed: int | None = Field(None, ge=-LARGEST_SEED, le=LARGEST_SEED)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    logprobs: int | None = Field(None, ge=0, le=5, description="Shares of the bound, by token.")
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    num_steps: int | None = Field(None, ge=1, description="Steps of the sampler; a map's 4, a base's 64.")
    sampler: Literal["renoise", "flow_map", "euler", "heun", "localisation"] | None = None
    noise: float | None = Field(None, ge=0, le=2, description="Of renoise: variance it adds, a share of the path's.")
    trajectory: int | None = Field(None, ge=1, le=10, description="Alternatives to show of every step and position.")
    best_of: int | None = Field(None, ge=1)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    user: Text | None = None
