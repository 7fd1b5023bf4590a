# ---- a flow that dies


@pytest.mark.parametrize("crash", CRASHES)
def test_a_flow_that_is_killed(crash: str, tmp_path: Path) -> None:
    with staged(tmp_path) as stage:
        sender = stage.sender()
        stage.publish(growing_alert("before", stage.desk.now_ms(), 0.3))
        dying = stage.flow(crash, **KEEPING)
        assert dying.wait() == -9, dying.said
        flow = stage.flow(**KEEPING)
        stage.live_alert("after", lambda: time.sleep(0.3))
        stage.to_the_logs(stage.desk.close("before", "found"))
        sender.end()
        stage.settle()
        assert flow.stop() == 0, flow.said
        stage.check(pushes_min=500)


def test_flows_that_are_killed_while_logs_are_trimmed_behind_them(tmp_path: Path) -> None:
    with staged(tmp_path) as stage:
        keeper = LogKeeper(stage.server.url)
        keeper.start()
        sender = stage.sender()
        flow = stage.flow(**OFTEN)
        for life in range(3):
            stage.live_alert(f"{life}", lambda: stage.wait_for_checkpoints(2))
            flow.kill()
            flow = stage.flow(**OFTEN)
        sender.end()
        stage.settle()
        assert flow.stop() == 0, flow.said
        for shard in range(SHARD_COUNT):
            newest, older = stage.positions(shard)
            assert stage.trimmed(shard) < older < newest == last_id(stage.client, log_key(shard)) == stage.done(shard)
            # All of it is gone, and nothing else: the older checkpoint's own entry is the first that is left.
            ((first, _),) = cast(QueueEntries, stage.client.xrange(log_key(shard), count=1))
            assert parse_id(first) == older
        logs = keeper.end()
        assert sum(map(len, logs.values())) > 2 * sum(map(len, stage.logs().values()))
        stage.check(logs, pushes_min=500)


def test_a_clean_stop_leaves_a_checkpoint_and_nothing_to_replay(tmp_path: Path) -> None:
    with staged(tmp_path) as stage:
        flow = stage.flow(checkpoint_interval_s=600.0)
        stage.send(crowd(1, 300, stage.desk.now_ms()))
        stage.live_alert("a", lambda: time.sleep(0.2))
        stage.settle()
        assert flow.stop() == 0
        heads = [last_id(stage.client, log_key(shard)) for shard in range(SHARD_COUNT)]
        assert [stage.positions(shard) for shard in range(SHARD_COUNT)] == [[head] for head in heads]
        logs, queues = stage.logs(), stage.queues()
        # Its whole past is gone; so whatever it writes from now on comes from the checkpoint alone.
        for shard in range(SHARD_COUNT):
            stage.client.xtrim(log_key(shard), minid=format_id(heads[shard]), approximate=False)
        flow = stage.flow(checkpoint_interval_s=600.0)
        stage.live_alert("b", lambda: time.sleep(0.2))
        stage.settle()
        assert flow.stop() == 0
        assert "warning" not in flow.said.lower()
        added = {shard: stage.logs()[shard][1:] for shard in range(SHARD_COUNT)}
        stage.check({shard: logs[shard] + added[shard] for shard in logs})
        assert stage.queues() != queues


def test_a_ring_that_grew_while_no_flow_ran_tells_whom_it_reached_then(tmp_path: Path) -> None:
    with staged(tmp_path) as stage:
        since_ms = stage.desk.now_ms()
        stage.send(
            [PingEvent("amap", "two", round((HOME_LAT + 1.5 * KM) * DEGREE_E7), round(HOME_LNG * DEGREE_E7), since_ms)]
        )
        flow = stage.flow(checkpoint_interval_s=600.0)
        stage.publish(growing_alert("a", since_ms, 0.4))
        stage.settle()
        flow.kill() if stage.desk.now_ms() > since_ms + 400 else flow.stop()
        time.sleep(max(0.0, (since_ms + 900 - stage.desk.now_ms()) / 1000))
        flow = stage.flow(checkpoint_interval_s=600.0)
        eventually(lambda: told_in(stage.queues()), timeout_s=10)
        flow.stop()
        ((_, fields),) = [entry for entries in stage.queues().values() for entry in entries]
        push = decode_push(fields[b"alert"])
        assert (push.device_ids, push.ring_km, push.at_ms) == (("two",), 2.0, since_ms + 400)


@pytest.mark.parametrize(
    "splits",
    [
        [["0-3"], ["0-1", "2-3"], ["0", "1", "2", "3"], ["0-3"]],
        [["0-3", "0-3"], ["0-2", "1-3"]],
    ],
    ids=["1, 2, 4, 1 processes", "two for the same shards, by mistake"],
)
def test_other_processes_than_before_go_on_from_the_same_checkpoints(splits: list[list[str]], tmp_path: Path) -> None:
    with staged(tmp_path) as stage:
        sender = stage.sender()
        stage.publish(growing_alert("all along", stage.desk.now_ms(), 0.3))
        for number, split in enumerate(splits):
            flows = [stage.flow(shards=shards, **KEEPING) for shards in split]
            stage.live_alert(str(number), stage.wait_for_checkpoints)
            if number == len(splits) - 1:
                stage.to_the_logs(stage.desk.close("all along", "found"))
                sender.end()
                stage.settle()
            for flow in flows:
                if number % 2:
                    flow.kill()
                else:
                    assert flow.stop() == 0, flow.said
        stage.check(pushes_min=500)


# ---- checkpoints that cannot be used


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[Stage]:
    """A deployment that has stopped, with two checkpoints a shard, some pushes, and whole logs."""
    with staged(tmp_path) as stage:
        flow = stage.flow(**KEEPING)
        stage.send(crowd(1, 300, stage.desk.now_ms()))
        stage.publish(growing_alert("a", stage.desk.now_ms(), 0.1))
        stage.wait_for_checkpoints(2)
        assert flow.stop() == 0, flow.said
        yield stage


def flip_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 2 // 3] ^= 0x10
    path.write_bytes(raw)


def go_on(stage: Stage) -> ForkedFlow:
    """A flow that starts, tells the end of the alert, and stops."""
    flow = stage.flow(checkpoint_interval_s=600.0, trim_logs=False)
    stage.to_the_logs(stage.desk.close("a", "found"))
    stage.settle()
    assert flow.stop() == 0, flow.said
    return flow


def test_a_checkpoint_with_a_flipped_byte_is_passed_over_for_the_one_before(stopped: Stage) -> None:
    damaged, good = stopped.store.finals(2)
    flip_a_byte(damaged.path)
    flow = go_on(stopped)
    assert f"shard 2: a checkpoint cannot be used: {damaged.path}: column " in flow.said
    assert f"shard 2: reads its log from a checkpoint, behind {format_id(good.position)}" in flow.said
    assert damaged.path not in [checkpoint.path for checkpoint in stopped.store.finals(2)]
    stopped.check()


def test_without_a_usable_checkpoint_a_whole_log_is_read_from_its_beginning(stopped: Stage) -> None:
    for checkpoint in stopped.store.finals(1):
        flip_a_byte(checkpoint.path)
    for checkpoint in stopped.store.finals(3):
        checkpoint.path.unlink()
    flow = go_on(stopped)
    assert flow.said.count("cannot be used") == 2
    stopped.check()


def test_a_deleted_folder_and_a_trimmed_log_are_refused_by_name(stopped: Stage) -> None:
    trimming = stopped.flow(**OFTEN)
    eventually(lambda: all(stopped.trimmed(shard) > (0, 0) for shard in range(SHARD_COUNT)), timeout_s=20)
    trimming.stop()
    shutil.rmtree(stopped.var / "checkpoints")
    queues = stopped.queues()
    flow = stopped.flow(**OFTEN)
    assert flow.wait() == EXIT_REFUSED
    assert "refused: shard 0 cannot be started: there is no checkpoint" in flow.said
    assert f"its log was trimmed up to {format_id(stopped.trimmed(0))}" in flow.said
    assert stopped.queues() == queues


def test_a_log_that_lost_its_tail_is_read_on_from_the_checkpoint_before(tmp_path: Path) -> None:
    with staged(tmp_path) as stage:
        flow = stage.flow(checkpoint_interval_s=600.0)
        stage.send(crowd(1, 300, stage.desk.now_ms()))
        stage.publish(growing_alert("a", stage.desk.now_ms(), 0.1))
        stage.settle()
        assert flow.stop() == 0
        (file,) = (tmp_path / "valkey" / "appendonlydir").glob("*.incr.aof")
        whole_bytes = file.stat().st_size
        flow = stage.flow(checkpoint_interval_s=600.0)
        stage.send(crowd(2, 300, stage.desk.now_ms()))
        stage.settle()
        assert flow.stop() == 0
        lost = [stage.positions(shard)[0] for shard in range(SHARD_COUNT)]
        stage.server.close()
        with file.open("ab") as opened:
            opened.truncate(whole_bytes + 11)  # in the middle of an entry
        with EmbeddedServer.start(tmp_path / "valkey", port=None, memory_bytes_max=512 << 20):
            assert all(last_id(stage.client, log_key(shard)) < lost[shard] for shard in range(SHARD_COUNT))
            stage.send(crowd(3, 300, stage.desk.now_ms()))
            flow = go_on(stage)
            assert flow.said.count("the log has lost its tail") == SHARD_COUNT
            stage.check()
