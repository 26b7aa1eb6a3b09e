"""Score lm-eval's requests with a model, running what several requests begin with once.

The answers of a multiple-choice example share its question. lm-eval runs the question again with every
answer, padded, and takes logits of all of it; here the question goes into a key-value cache, which its
answers continue, and logits are taken of answers only. Nothing is padded on the left and all rows of a
batch share the length of what is cached, so that positions are what the model itself takes them for.
Imports lm-eval, which takes seconds: import it where it is used.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from aasvd.likelihood import token_losses
from aasvd.progress import Bar

# A beginning shorter than this is not worth a pass of its own.
_SHORTEST = 8
# Elements of the logits of one batch.
_LOGITS = 2**28


class Request(NamedTuple):
    """One continuation to score.

    Attributes:
        number: Its place among all requests.
        tokens: What the model reads: context and continuation without its last token.
        targets: The continuation.
    """

    number: int
    tokens: list[int]
    targets: list[int]

    @property
    def start(self) -> int:
        """Position whose logits predict the first target."""
        return len(self.tokens) - len(self.targets)


class Group(NamedTuple):
    """Requests whose first `shared` tokens are equal, none of which predicts a target."""

    shared: int
    requests: list[Request]


def grouped(requests: Sequence[Request], *, largest: int) -> list[Group]:
    """Group requests so that running each group's shared beginning once saves tokens.

    In lexicographic order, requests with long common beginnings are neighbours. One joins the group
    before it if that saves more than the shorter beginning costs the group's others.

    Args:
        requests: The requests, in any order.
        largest: Most requests in a group.
    """
    groups: list[Group] = []
    before: list[int] = []
    for request in sorted(requests, key=lambda request: request.tokens):
        if groups and len(groups[-1].requests) < largest:
            shared, members = groups[-1]
            common = min(shared, request.start, _common(before, request.tokens))
            if common >= _SHORTEST and common * len(members) > shared * (len(members) - 1):
                groups[-1] = Group(common, [*members, request])
                before = request.tokens
                continue
        groups.append(Group(request.start, [request]))
        before = request.tokens
    return groups


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common from the start."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))


def batches(groups: Sequence[Group], *, size: int, vocabulary: int) -> Iterator[list[Group]]:
    """Yield groups of similar shared lengths, longest first, together at most `size` requests."""
    batch: list[Group] = []
    count = longest = 0
    for group in sorted(groups, key=lambda g: (-g.shared, -max(len(r.tokens) for r in g.requests))):
        # The cached length of a batch is its shortest, so that of the group that comes last.
        rest = max(len(request.tokens) for request in group.requests) - group.shared
        grown = max(longest, rest)
        elements = (count + len(group.requests)) * grown * vocabulary
        if batch and (count + len(group.requests) > size or elements > _LOGITS):
            yield batch
            batch, count, grown = [], 0, rest
        batch.append(group)
        count, longest = count + len(group.requests), grown
    if batch:
        yield batch


class SharedPrefixLM(HFLM):
    """lm-eval's own wrapper of a transformers model, except for how log likelihoods are computed."""

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Return, per request, the continuation's log likelihood and whether it is the greedy one.

        Args:
            requests: (texts, tokens of the context, tokens of the continuation); what is too long for the
                model is cut on the left, as lm-eval does.
            disable_tqdm: Show no progress bar.
            override_bs: Requests per forward pass, instead of the wrapper's own number.

        Raises:
            ValueError: If log likelihoods are infinite or not a number; counts them.
        """
        size = override_bs or self.batch_size
        known = [self._request(number, *tokens) for number, (_, *tokens) in enumerate(requests)]
        found: dict[int, tuple[float, bool]] = {}
        vocabulary = self.model.config.get_text_config().vocab_size
        with Bar(total=len(known), desc="requests", disable=disable_tqdm) as bar:
            for batch in batches(grouped(known, largest=size), size=size, vocabulary=vocabulary):
                scored = self._score(batch)
                found |= scored
                bar.update(len(scored))
        # Comparisons with nan are false: the first answer would always win, at a plausible accuracy.
        if broken := sum(not math.isfinite(likelihood) for likelihood, _ in found.values()):
            raise ValueError(f"{broken} of {len(known)} requests have a log likelihood that is not finite")
        return [found[number] for number in range(len(known))]

    def _request(self, number: int, context: list[int], continuation: list[int]) -> Request:
        return Request(number, [*context, *continuation][-(self.max_length + 1) :][:-1], continuation)

    @torch.inference_mode()
    def _score(self, groups: Sequence[Group]) -> dict[int, tuple[float, bool]]:
        """Score a batch of groups in two passes: their beginnings, then all their requests' rests."""
        cached = min(group.shared for group in groups)
        requests = [request for group in groups for request in group.requests]
        cache = None
        if cached:
            beginnings = [group.requests[0].tokens[:cached] for group in groups]
            # Without the head: nobody asks for these logits.
            decoder = self.model.get_decoder()
            cache = decoder(input_ids=self._tensor(beginnings), use_cache=True).past_key_values
            owners = [number for number, group in enumerate(groups) for _ in group.requests]
            cache.batch_select_indices(self._tensor(owners))
        longest = max(len(request.tokens) for request in requests)
        # Whatever stands behind a request's own tokens is seen by none of them.
        rests = [request.tokens[cached:] + [0] * (longest - len(request.tokens)) for request in requests]
        logits = self.model(
            input_ids=self._tensor(rests), past_key_values=cache, use_cache=cache is not None
        ).logits
        rows = [row for row, request in enumerate(requests) for _ in request.targets]
        columns = [
            position - cached
            for request in requests
            for position in range(request.start, len(request.tokens))
        ]
        targets = self._tensor([target for request in requests for target in request.targets])
        predicting = logits[self._tensor(rows), self._tensor(columns)]
        likelihoods, greedy = -token_losses(predicting, targets), predicting.argmax(dim=-1) == targets
        ends = [len(request.targets) for request in requests]
        return {
            request.number: (float(own.sum(dtype=torch.float64)), bool(hits.all()))
            for request, own, hits in zip(
                requests, torch.split(likelihoods, ends), torch.split(greedy, ends), strict=True
            )
        }

    def _tensor(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
