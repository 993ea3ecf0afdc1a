"""What a client does not answer, what the coordinator does not take, and secrets that do not open."""

import copy

import numpy as np
import pytest
from secagg_rounds import Cohort, terms

from fedtune.errors import Refused, SecAggFailed
from fedtune.secagg import messages
from fedtune.secagg.client import ClientRound
from fedtune.secagg.graph import Design
from fedtune.secagg.keys import agree, new_pair, seal, share_label, unseal
from fedtune.secagg.messages import Keys, Place
from fedtune.secagg.server import run_round

FIRST = "device-0"
LOW_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    ((1 << 255) - 19).to_bytes(32, "little"),
    ((1 << 255) - 20).to_bytes(32, "little"),
]


def refused(reason, action, *arguments):
    with pytest.raises(Refused) as e:
        action(*arguments)
    assert e.value.reason == reason and "\n" not in str(e.value)


def over(client):
    assert client._state is None
    for call in (client.keys, client.shares, client.unmask):
        refused("order", call, b"")


class TestTheClient:
    def test_answers_each_question_once(self):
        cohort = Cohort(4)
        question = cohort.until("unmask")[FIRST]
        client = cohort.rounds[FIRST]
        assert client.unmask(question)
        over(client)
        refused("order", client.unmask, question)

    def test_does_not_give_the_other_share_at_a_second_question(self):
        cohort = Cohort(4)
        cohort.until("unmask")
        client = cohort.rounds[FIRST]
        me = client._state.index
        others = [i for i in range(4) if i != me]
        client.unmask(messages.survivors(cohort.terms, sorted([me, *others[:2]]), others[2:]))
        refused("order", client.unmask, messages.survivors(cohort.terms, range(4), []))

    @pytest.mark.parametrize("stage", ["shares", "unmask"])
    def test_refuses_questions_out_of_order(self, stage):
        client = ClientRound(terms(), minimum=2)
        refused("order", getattr(client, stage), b"")
        over(client)

    @pytest.mark.parametrize(
        "there, gone, reason",
        [
            ([0, 1, 2, 3], [3], "survivors"),  # in both lists
            ([0, 1, 2], [], "survivors"),  # one left out
            ([0, 1, 2, 3, 9], [], "survivors"),  # one unknown
            ([1, 2, 3], [0], "survivors"),  # itself gone
            ([0, 1], [2, 3], "threshold"),
            ([], [0, 1, 2, 3], "survivors"),
        ],
    )
    def test_refuses_contradictions_at_the_last_question(self, there, gone, reason):
        cohort = Cohort(4)
        cohort.until("unmask")
        client = next(c for c in cohort.rounds.values() if c._state.index == 0)
        refused(reason, client.unmask, messages.survivors(cohort.terms, there, gone))
        over(client)

    @pytest.mark.parametrize(
        "minimum, threshold, reason",
        [(4, 3, "threshold"), (2, 2, "threshold"), (2, 5, "threshold"), (2, 0, "threshold"), (4, 4, None)],
    )
    def test_has_a_floor_for_threshold_and_cohort(self, minimum, threshold, reason):
        client = ClientRound(terms(), minimum=minimum)
        client.keys(messages.ask_keys(terms()))
        question = messages.place(
            terms(), Place(7, threshold, {i: Keys(new_pair().public, new_pair().public) for i in (1, 2, 9)})
        )
        if reason is None:
            assert client.shares(question)
        else:
            refused(reason, client.shares, question)
            over(client)

    def test_a_floor_of_one_is_none(self):
        with pytest.raises(ValueError, match="at least 2"):
            ClientRound(terms(), minimum=1)

    @pytest.mark.parametrize("wrong", ["twice", "both the same", "mine", "low order", "itself", "alone"])
    def test_refuses_neighbours_that_cannot_be(self, wrong):
        client = ClientRound(terms(), minimum=2)
        mine = messages.read_keys(client.keys(messages.ask_keys(terms())), terms())
        keys = {i: Keys(new_pair().public, new_pair().public) for i in (1, 2)}
        one, other = keys[1], keys[2]
        keys = {
            "twice": {1: one, 2: Keys(other.sealing, one.masking)},
            "both the same": {1: Keys(one.sealing, one.sealing), 2: other},
            "mine": {1: one, 2: mine},
            "low order": {1: one, 2: Keys(LOW_ORDER[0], other.masking)},
            "itself": {1: one, 7: other},
            "alone": {},
        }[wrong]
        reason = {"itself": "neighbours", "alone": "threshold"}.get(wrong, "key")
        refused(reason, client.shares, messages.place(terms(), Place(7, 2, keys)))
        over(client)

    def test_refuses_a_neighbour_whose_mask_key_is_of_low_order(self):
        cohort = Cohort(3)
        questions = cohort.until("shares")
        place = messages.read_place(questions[FIRST], cohort.terms)
        i = next(iter(place.keys))
        bad = Place(place.index, place.threshold, place.keys | {i: Keys(place.keys[i].sealing, LOW_ORDER[1])})
        cohort.rounds[FIRST].shares(messages.place(cohort.terms, bad))
        for name in cohort.names[1:]:
            cohort.server.take(name, cohort.rounds[name].shares(questions[name]))
        inbox = {j: box for j, box in ((j, cohort.server._stage.sealed[j][place.index]) for j in place.keys)}
        # The sealed shares were made for its sealing key, which is unchanged,
        # so they open; the pair has no mask.
        refused(
            "key", cohort.rounds[FIRST].masked, messages.inbox(cohort.terms, inbox), cohort.vectors[FIRST]
        )
        over(cohort.rounds[FIRST])

    def test_a_neighbours_key_put_in_place_of_anothers_opens_no_share(self):
        cohort = Cohort(3)
        questions = cohort.until("shares")
        place = messages.read_place(questions[FIRST], cohort.terms)
        i = next(iter(place.keys))
        bad = Place(
            place.index, place.threshold, place.keys | {i: Keys(new_pair().public, place.keys[i].masking)}
        )
        answers = {
            n: cohort.rounds[n].shares(messages.place(cohort.terms, bad) if n == FIRST else questions[n])
            for n in cohort.names
        }
        for name, answer in answers.items():
            cohort.server.take(name, answer)
        for name, question in cohort.server.ask().items():
            hit = name == FIRST or cohort.server._stage.circle.index[name] == i
            if hit:
                refused("share", cohort.rounds[name].masked, question, cohort.vectors[name])
            else:
                assert cohort.rounds[name].masked(question, cohort.vectors[name])

    @pytest.mark.parametrize(
        "wrong", ["a bit", "another's", "another receiver's", "its own back", "a stranger", "too few"]
    )
    def test_refuses_shares_that_were_changed_or_moved(self, wrong):
        cohort = Cohort(5, Design(4, 4))
        question = cohort.until("masked")[FIRST]
        boxes = messages.read_inbox(question, cohort.terms)
        a, b, *_ = boxes
        me = cohort.server._stage.circle.index[FIRST]
        sealed = cohort.server._stage.sealed
        boxes, reason = {
            "a bit": (boxes | {a: bytes([boxes[a][0] ^ 1]) + boxes[a][1:]}, "share"),
            "another's": (boxes | {a: boxes[b]}, "share"),
            "another receiver's": (boxes | {a: sealed[a][b]}, "share"),
            "its own back": (boxes | {a: sealed[me][a]}, "share"),
            "a stranger": (boxes | {77: boxes[a]}, "client"),
            "too few": ({a: boxes[a], b: boxes[b]}, "threshold"),
        }[wrong]
        refused(
            reason, cohort.rounds[FIRST].masked, messages.inbox(cohort.terms, boxes), cohort.vectors[FIRST]
        )
        over(cohort.rounds[FIRST])

    @pytest.mark.parametrize("other", [terms(round=4), terms(session=bytes(16))])
    def test_shares_of_another_round_or_session_do_not_open(self, other):
        """Not even under the same keys, which no two rounds have."""
        mine, theirs = new_pair(), new_pair()
        label, old = (share_label(t, 1, theirs.public, 0, mine.public) for t in (terms(), other))
        box = seal(agree(theirs, mine.public), old, bytes(66))
        refused("share", unseal, agree(mine, theirs.public), label, box)
        assert unseal(agree(mine, theirs.public), old, box) == bytes(66)
        cohort = Cohort(3, terms=other)
        question = cohort.until("masked")[FIRST]
        late = Cohort(3)
        late.until("masked")
        refused(
            "session" if other.round == 3 else "round",
            copy.deepcopy(late.rounds[FIRST]).masked,
            question,
            late.vectors[FIRST],
        )
        boxes = messages.read_inbox(question, other)
        mine_now = late.rounds[FIRST]._state.place
        moved = messages.inbox(late.terms, dict(zip(mine_now.keys, boxes.values())))
        refused("share", late.rounds[FIRST].masked, moved, late.vectors[FIRST])

    def test_takes_vectors_of_the_round_only_and_leaves_them_alone(self):
        cohort = Cohort(3)
        question = cohort.until("masked")[FIRST]
        for wrong in (
            np.zeros(5, np.int64),
            np.zeros(4, np.uint32),
            np.zeros((1, 5), np.uint32),
            np.zeros(5),
        ):
            with pytest.raises(ValueError, match="must be"):
                cohort.rounds[FIRST].masked(question, wrong)
        before = cohort.vectors[FIRST].copy()
        cohort.vectors[FIRST].flags.writeable = False
        assert cohort.rounds[FIRST].masked(question, cohort.vectors[FIRST])
        np.testing.assert_array_equal(cohort.vectors[FIRST], before)

    def test_shows_no_secret_when_printed(self):
        cohort = Cohort(3)
        cohort.until("masked")
        state = cohort.rounds[FIRST]._state
        assert (
            repr(state.seed) not in repr(state) and "private" not in repr(state) and "mine" not in repr(state)
        )
        cohort.answer("masked", FIRST, cohort.server._stage.questions()[FIRST])
        assert "seeds" not in repr(cohort.rounds[FIRST]._state) and not hasattr(
            cohort.rounds[FIRST]._state, "pairs"
        )


class TestTheCoordinator:
    def test_takes_one_answer_of_those_it_asked(self):
        cohort = Cohort(3)
        questions = cohort.until("keys")
        answer = cohort.rounds[FIRST].keys(questions[FIRST])
        cohort.server.take(FIRST, answer)
        refused("duplicate", cohort.server.take, FIRST, answer)
        refused("client", cohort.server.take, "nobody", answer)
        refused("key", cohort.server.take, "device-1", answer)

    @pytest.mark.parametrize("key", LOW_ORDER)
    def test_refuses_a_key_that_all_others_would_refuse(self, key):
        cohort = Cohort(4)
        bad = messages.keys(cohort.terms, Keys(new_pair().public, key))
        found = run_round(
            cohort.server,
            cohort.ask(change=lambda stage, name, a: bad if (stage, name) == ("keys", FIRST) else a),
        )
        assert found.clients == tuple(cohort.names[1:]) and "key" in found.refused[FIRST]

    def test_refuses_an_answer_in_anothers_name(self):
        cohort = Cohort(4)
        questions = cohort.until("shares")
        answers = {n: cohort.rounds[n].shares(questions[n]) for n in cohort.names}
        refused("sender", cohort.server.take, FIRST, answers["device-1"])

    def test_refuses_shares_for_others_than_the_neighbours(self):
        cohort = Cohort(8, Design(4, 3))
        questions = cohort.until("shares")
        check, sealed = messages.read_shares(
            cohort.rounds[FIRST].shares(questions[FIRST]),
            cohort.terms,
            cohort.server._stage.circle.index[FIRST],
        )
        index = cohort.server._stage.circle.index[FIRST]
        box = next(iter(sealed.values()))
        for wrong in (dict(list(sealed.items())[1:]), sealed | {100: box}, {}):
            refused("client", cohort.server.take, FIRST, messages.shares(cohort.terms, index, check, wrong))

    def test_takes_no_vector_once_its_sender_is_counted_as_gone(self):
        cohort = Cohort(4)
        questions = cohort.until("masked")
        late = cohort.rounds[FIRST].masked(questions[FIRST], cohort.vectors[FIRST])
        for name in cohort.names[1:]:
            cohort.server.take(name, cohort.rounds[name].masked(questions[name], cohort.vectors[name]))
        asked = cohort.server.ask()
        assert FIRST not in asked
        refused("duplicate", cohort.server.take, FIRST, late)

    def test_a_replayed_vector_of_an_earlier_round_is_refused(self):
        old = Cohort(4, terms=terms(round=2))
        replay = old.rounds[FIRST].masked(old.until("masked")[FIRST], old.vectors[FIRST])
        cohort = Cohort(4)
        found = run_round(
            cohort.server,
            cohort.ask(change=lambda stage, name, a: replay if (stage, name) == ("masked", FIRST) else a),
        )
        assert found.clients == tuple(cohort.names[1:]) and found.refused[FIRST].startswith(
            "round: a message of round 2"
        )

    @pytest.mark.parametrize("wrong", ["left out", "one more", "both kinds", "swapped"])
    def test_refuses_other_shares_than_it_asked_for(self, wrong):
        cohort = Cohort(4)
        questions = cohort.until("unmask", {"device-3": "masked"})
        index = cohort.server._stage.circle.index[FIRST]
        seeds, keys = messages.read_opened(cohort.rounds[FIRST].unmask(questions[FIRST]), cohort.terms, index)
        share = next(iter(seeds.values()))
        seeds, keys = {
            "left out": (dict(list(seeds.items())[1:]), keys),
            "one more": (seeds | {50: share}, keys),
            "both kinds": (seeds | keys, keys),
            "swapped": (keys, seeds),
        }[wrong]
        refused("client", cohort.server.take, FIRST, messages.opened(cohort.terms, index, seeds, keys))

    @pytest.mark.parametrize("kind", ["seed", "mask key"])
    def test_one_wrong_share_fails_closed(self, kind):
        cohort = Cohort(4)

        def change(stage, name, answer):
            if (stage, name) != ("unmask", FIRST):
                return answer
            index = cohort.server._stage.circle.index[name]
            tables = messages.read_opened(answer, cohort.terms, index)
            table = tables[kind == "mask key"]
            owner = next(iter(table))
            share = bytearray(table[owner])
            # not among the lowest bits: X25519 ignores three of the key,
            # and weights of points 1, 2, 3 are small
            share[9] ^= 1
            table[owner] = bytes(share)
            return messages.opened(cohort.terms, index, *tables)

        with pytest.raises(
            SecAggFailed, match=r"shares of client 'device-\d' do not open its secret: .*nothing is released"
        ):
            run_round(cohort.server, cohort.ask({"device-3": "masked"}, change))

    @pytest.mark.parametrize("drop", [True, False])
    def test_a_client_that_shared_another_mask_key_is_found_out_when_it_is_gone(self, drop):
        """While it stays its key is not opened, and the sum is right:
        the key that counts is the one it masked with.
        """
        cohort = Cohort(4)
        questions = cohort.until("shares")
        client = cohort.rounds["device-3"]
        honest = client._state
        client._state = type(honest)(honest.sealing, new_pair())
        cohort.server.take("device-3", client.shares(questions["device-3"]))
        client._state = type(client._state)(honest, *list(vars(client._state).values())[1:])
        for name in cohort.names[:3]:
            cohort.server.take(name, cohort.rounds[name].shares(questions[name]))
        ask = cohort.ask({"device-3": "masked"} if drop else {})
        for stage in ("masked", "unmask"):
            for name, answer in ask(stage, cohort.server.ask()):
                if answer:
                    cohort.server.take(name, answer)
        if drop:
            with pytest.raises(
                SecAggFailed,
                match="'device-3' do not open its secret: the mask key is not that of its public key",
            ):
                cohort.server.finish()
        else:
            assert cohort.server.finish().clients == tuple(cohort.names)

    def test_a_seed_that_is_not_the_promised_one_is_named(self):
        cohort = Cohort(4)

        def change(stage, name, answer):
            if (stage, name) != ("shares", FIRST):
                return answer
            index = cohort.server._stage.circle.index[name]
            return messages.shares(
                cohort.terms, index, bytes(32), messages.read_shares(answer, cohort.terms, index)[1]
            )

        with pytest.raises(
            SecAggFailed, match="'device-0' do not open its secret: the seed is not the one it promised"
        ):
            run_round(cohort.server, cohort.ask(change=change))
