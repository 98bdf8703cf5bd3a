@dataclass(frozen=True)
class _Turn:
    """How the stored picture becomes upright: the display matrix, by its signs."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def of(cls, frame: VideoFrame) -> _Turn:
        data = cast(Any, frame.side_data).get(SideDataType.DISPLAYMATRIX)
        if data is None:
            return cls()
        # x' = a x + c y and y' = b x + d y
        a, b, _, c, d = np.frombuffer(memoryview(cast(Any, data)), np.int32)[:5].tolist()
        if abs(b) > abs(a):
            return cls(transpose=True, flip_x=c < 0, flip_y=b < 0)
        return cls(flip_x=a < 0, flip_y=d < 0)

    def apply(self, picture: _Picture) -> _Picture:
        if self.transpose:
            picture = picture.transpose(1, 0, 2)
        return picture[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]


