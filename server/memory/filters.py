"""What a filter asks of rows of memories."""

from server.memory.model import Filter


def passing(which: Filter, first: int) -> tuple[str, tuple[object, ...]]:
    """Return the conditions of a filter in SQL, and the parameters that stand in them.

    What lets all memories pass is left out: it would be looked at for each of a user's rows.

    Args:
        which: The filter. Whether it is about active or archived memories is not among these.
        first: The number of the first parameter.
    """
    asked: list[tuple[str, object]] = [("tier = ANY (${})", which.durable_tiers)]
    if which.tags:
        asked.append(("tags @> ${}", list(which.tags)))
    if which.session_id:
        # That it is not empty says itself, but not to the planner of any session: the index of
        # sessions has no others.
        asked.append(("session_id = ${} AND session_id <> ''", which.session_id))
    if which.occurred_after:
        asked.append(("occurred_at >= ${}", which.occurred_after))
    if which.occurred_before:
        asked.append(("occurred_at < ${}", which.occurred_before))
    conditions = (text.format(number) for number, (text, _) in enumerate(asked, first))
    return " AND ".join(conditions), tuple(parameter for _, parameter in asked)
