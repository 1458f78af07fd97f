"""Snapshots of streams that are fed text."""

import pytest

from guardengine import Engine
from guardengine.errors import InvalidText


@pytest.mark.slow
def test_held_text_is_not_lost_in_a_snapshot(checkpoints) -> None:
    folder = checkpoints(dtype="float32")
    with Engine.from_pretrained(folder, kv_cache_bytes=2**22, max_model_len=256) as engine:
        stream = engine.open(messages=[{"role": "user", "content": "Where?"}])
        stream.append_text("In Par")
        assert stream.held_text
        with pytest.raises(InvalidText, match="finish_text"):
            stream.snapshot()
        stream.append_text("is")
        stream.finish_text()
        engine.run()
        saved, labels = stream.snapshot(), len(stream.labels)
        restored = engine.restore(saved, stream_id="again")
        assert restored.token_ids == stream.token_ids
        assert len(restored.labels) == labels
