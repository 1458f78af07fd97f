"""CheckedPolicies: whether a policy names risks and categories that a checkpoint has.

Policies do not change, so each is checked once.
"""

from __future__ import annotations

from guardengine.checkpoint.model_config import RISKS, GuardHeadsConfig
from guardengine.errors import ConfigError
from guardengine.gen.parse import CATEGORIES
from guardengine.policy import Policy

_MAX_CHECKED = 64  # policies that are remembered


class CheckedPolicies:
    """The policies that fit one checkpoint. For any thread."""

    def __init__(self, heads: GuardHeadsConfig | None) -> None:
        """
        Args:
            heads: The classes of a Stream checkpoint; None for a Gen one, whose classes are fixed.
        """
        self._heads = heads
        self._default = Policy.strict()
        self._checked: dict[int, Policy] = {}  # by id

    def check(self, policy: Policy | None) -> Policy:
        """Check a policy.

        Args:
            policy: None for Policy.strict().

        Returns:
            The policy.

        Raises:
            ConfigError: It is no Policy, or names a class that the checkpoint does not have.
        """
        policy = self._default if policy is None else policy
        if self._checked.get(id(policy)) is policy:
            return policy
        if not isinstance(policy, Policy):
            raise ConfigError(f"policy={policy!r}: a Policy is needed, such as Policy.strict()")
        heads = self._heads
        if heads is None:
            policy.check_names(RISKS, CATEGORIES)
        else:
            policy.check_names(
                tuple(dict.fromkeys(heads.response_risks + heads.query_risks)),
                tuple(dict.fromkeys(heads.response_categories + heads.query_categories)),
            )
        if len(self._checked) >= _MAX_CHECKED:
            self._checked.clear()
        self._checked[id(policy)] = policy
        return policy
