"""Numbers of what is found in films."""

from __future__ import annotations

import torch

from mvit_video.prediction.follower import LOST, Follower

LEFT, RIGHT, NEW = [0.1, 0.1, 0.3, 0.5], [0.6, 0.1, 0.9, 0.5], [0.4, 0.6, 0.5, 0.9]


def test_what_stays_keeps_its_number() -> None:
    follow = Follower()
    assert follow(torch.tensor([LEFT, RIGHT])) == [0, 1]
    assert follow(torch.tensor([RIGHT, NEW, LEFT])) == [1, 2, 0]
    assert follow(torch.empty(0, 4)) == []
    assert follow(torch.tensor([LEFT])) == [3]


def test_what_is_missing_for_a_picture_is_known_again() -> None:
    follow = Follower(patience=1)
    assert follow(torch.tensor([LEFT, RIGHT])) == [0, 1]
    assert follow(torch.tensor([LEFT])) == [0]
    assert follow(torch.tensor([LEFT, RIGHT])) == [0, 1]
    for _ in range(2):
        assert follow(torch.tensor([LEFT])) == [0]
    assert follow(torch.tensor([RIGHT])) == [2]


def test_classes_do_not_change_and_doubtful_boxes_start_nothing() -> None:
    follow, boxes = Follower(), torch.tensor([LEFT, RIGHT])
    sure, doubtful = torch.tensor([True, True]), torch.tensor([False, True])
    assert follow(boxes, torch.tensor([0, 1]), doubtful) == [LOST, 0]
    assert follow(boxes, torch.tensor([0, 2]), sure) == [1, 2]
    assert follow(boxes, torch.tensor([0, 2]), doubtful) == [1, 2]
    twice = torch.tensor([LEFT, LEFT])
    assert follow(twice, torch.tensor([0, 0]), doubtful) == [LOST, 1]
