import numpy as np

from preprocess.flow.warp import compose, sample


def constant(dx, dy, size=(20, 30)):
    return np.broadcast_to(np.float32([dx, dy]), (*size, 2)).copy()


def test_translations_compose_to_their_sum():
    np.testing.assert_allclose(
        compose(constant(2.5, -1), constant(-0.25, 3)), constant(2.25, 2), atol=1e-6
    )


def test_affine_flows_compose_exactly_inside_the_frame():
    y, x = np.mgrid[:20, :30].astype(np.float32)
    first = np.dstack([0.1 * x - 2, 0.5 * np.ones_like(y)])
    second = np.dstack([0.05 * x, -0.1 * y])
    x1, y1 = x + first[..., 0], y + first[..., 1]
    expected = np.dstack([x1 * 1.05 - x, y1 * 0.9 - y])
    lands = (x1 >= 0) & (x1 <= 29) & (y1 >= 0) & (y1 <= 19)
    assert lands.sum() > 300
    np.testing.assert_allclose(compose(first, second)[lands], expected[lands], atol=0.01)


def test_a_point_that_leaves_is_extrapolated_with_the_border_motion():
    second = constant(1, 0)
    second[:, -1] = 7, 0
    composed = compose(constant(100, 0), second)
    np.testing.assert_allclose(composed, constant(107, 0), atol=1e-5)


def test_sampling_reads_the_target_pixel():
    image = np.arange(600, dtype=np.float32).reshape(20, 30)
    np.testing.assert_allclose(sample(image, constant(3, 2))[:18, :27], image[2:, 3:])
