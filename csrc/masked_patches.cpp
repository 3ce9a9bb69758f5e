// Every image under every coalition of patches; the definition is infoutil_fast/ops.py::masked_patches.
//
// One band of patches (H / rows image rows) of one image is brought into the output's layout and dtype once and stays in the cache while
// it is written for all coalitions. The writing is copies of runs of patches that are kept, or absent, side by side.
#include <memory>
#include <string>

#include "arrays.h"

namespace {

// A [B, C, H, W] array of float32 or bfloat16 with any strides, in bytes; stride 0 repeats.
struct Images {
    const char *data;
    bool half;  // bfloat16
    int64_t b = 0, c = 0, y = 0, x = 0;
};

struct Job {
    int64_t B, M, C, H, W, rows, cols;
    Images shown, hidden;
    const char *masks;
    int64_t mask_m, mask_d;  // strides in bytes
    char *out;
};

int64_t first_pixel(int64_t patch, int64_t patches, int64_t pixels) { return (patch * pixels + patches - 1) / patches; }

// Rows y0 to y1 of image b as [y1 - y0, W, C].
template <typename In, typename Out>
void pack_as(const Images &from, const Job &job, int64_t b, int64_t y0, int64_t y1, Out *to) {
    for (int64_t y = y0; y < y1; ++y)
        for (int64_t x = 0; x < job.W; ++x)
            for (int64_t c = 0; c < job.C; ++c) {
                In value;
                std::memcpy(&value, from.data + b * from.b + c * from.c + y * from.y + x * from.x, sizeof value);
                *to++ = from_float<Out>(to_float(value));
            }
}

template <typename Out> void pack(const Images &from, const Job &job, int64_t b, int64_t y0, int64_t y1, Out *to) {
    from.half ? pack_as<bfloat16>(from, job, b, y0, y1, to) : pack_as<float>(from, job, b, y0, y1, to);
}

struct Run {
    int64_t begin, end;  // elements of an image row
    bool keep;
};

// Items are ordered (image, band, coalition), so that a part of them packs few bands.
template <typename Out> void write(const Job &job, int64_t begin, int64_t end, Out *shown, Out *hidden, Run *runs) {
    const int64_t row = job.W * job.C;
    int64_t packed = -1;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t band = item / job.M, m = item % job.M, b = band / job.rows, r = band % job.rows;
        const int64_t y0 = first_pixel(r, job.rows, job.H), y1 = first_pixel(r + 1, job.rows, job.H);
        if (band != packed) {
            pack(job.shown, job, b, y0, y1, shown);
            pack(job.hidden, job, b, y0, y1, hidden);
            packed = band;
        }
        int64_t n = 0;
        for (int64_t c = 0; c < job.cols; ++c) {
            const bool keep = job.masks[m * job.mask_m + (r * job.cols + c) * job.mask_d] != 0;
            const int64_t stop = first_pixel(c + 1, job.cols, job.W) * job.C;
            if (n && runs[n - 1].keep == keep) runs[n - 1].end = stop;
            else runs[n] = {n ? runs[n - 1].end : 0, stop, keep}, ++n;
        }
        Out *to = reinterpret_cast<Out *>(job.out) + ((b * job.M + m) * job.H + y0) * row;
        for (int64_t y = 0; y < y1 - y0; ++y)
            for (int64_t i = 0; i < n; ++i) {
                const Out *from = (runs[i].keep ? shown : hidden) + y * row + runs[i].begin;
                char *start = reinterpret_cast<char *>(to + y * row + runs[i].begin);
                copy_onwards(start, reinterpret_cast<const char *>(from), (runs[i].end - runs[i].begin) * sizeof(Out));
            }
    }
}

template <typename Out> void run(const Job &job, int64_t threads) {
    const int64_t band = ((job.H + job.rows - 1) / job.rows) * job.W * job.C, items = job.B * job.rows * job.M;
    threads = std::max<int64_t>(1, std::min(threads, items));
    const std::unique_ptr<Out[]> scratch(new Out[2 * band * threads]);
    const std::unique_ptr<Run[]> runs(new Run[job.cols * threads]);
    each_part(threads, threads, [&](int64_t t) {
        Out *shown = scratch.get() + 2 * band * t;
        write(job, items * t / threads, items * (t + 1) / threads, shown, shown + band, runs.get() + job.cols * t);
    });
}

Images view(const py::array &a) {
    Images v{static_cast<const char *>(a.data()), is_bfloat16(a)};
    const auto n = a.ndim();
    if (n == 1) v.c = a.strides(0);
    if (n >= 3) v.c = a.strides(n - 3), v.y = a.strides(n - 2), v.x = a.strides(n - 1);
    if (n == 4) v.b = a.strides(0);
    return v;
}

py::array masked_patches(const py::array &images, const py::array_t<bool> &masks, std::pair<int64_t, int64_t> grid, const py::object &fill,
                         const py::object &dtype, const py::object &out, int64_t threads) {
    Job job{images.shape(0), masks.shape(0), images.shape(1), images.shape(2), images.shape(3), grid.first, grid.second};
    const bool half = dtype.is_none() ? is_bfloat16(images) : dtype.cast<std::string>() == "bfloat16";
    const auto type = half ? py::dtype::of<uint16_t>() : py::dtype::of<float>();
    const int64_t size = type.itemsize(), row = job.W * job.C * size;
    py::array result = out.is_none() ? py::array(type, {job.B * job.M, job.C, job.H, job.W}, {job.H * row, size, row, job.C * size})
                                     : out.cast<py::array>();
    const bool image = py::isinstance<py::array>(fill);
    const float number = image ? 0.0f : fill.cast<float>();
    job.shown = view(images);
    job.hidden = image ? view(fill.cast<py::array>()) : Images{reinterpret_cast<const char *>(&number), false};
    job.masks = static_cast<const char *>(static_cast<const void *>(masks.data()));
    job.mask_m = masks.strides(0), job.mask_d = masks.strides(1);
    job.out = static_cast<char *>(result.mutable_data());
    const py::gil_scoped_release release;
    half ? run<bfloat16>(job, threads) : run<float>(job, threads);
    return result;
}

}  // namespace

void bind_masked_patches(py::module_ &m) {
    m.def("masked_patches", &masked_patches, py::arg("images"), py::arg("masks"), py::arg("grid"), py::arg("fill"), py::arg("dtype"),
          py::arg("out"), py::arg("threads"));
}
