// The Python module maestro_fast._C. Arrays come as addresses and sizes; address 0 stands for a missing array. The
// caller keeps the memory alive, and has checked type, layout and device. std::invalid_argument reaches Python as
// ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "balance_sequences.hpp"
#include "conductor_weights.hpp"
#include "counterfactual_advantages.hpp"
#include "group_advantages.hpp"
#include "head_rows.hpp"
#include "number_keys.hpp"
#include "pack_sequences.hpp"
#include "token_mask.hpp"

namespace py = pybind11;
namespace mf = maestro_fast;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

mf::AdvantageProfile advantage_profile(int reward_center, int reward_scale, int score_center, int score_scale,
                                       double reward_eps, double score_eps, int ddof, bool raw_singleton,
                                       bool renormalize, bool eps_in_variance) {
  const auto scope = [](int value) { return static_cast<mf::Scope>(value); };
  return {scope(reward_center), scope(reward_scale), scope(score_center), scope(score_scale), reward_eps,
          score_eps,            ddof,                raw_singleton,       renormalize,        eps_in_variance};
}

void group_advantages(Address rewards, bool bfloat16, std::int64_t K, Address weights,
                      bool weights_per_row, Address kl, double beta, Address lengths, const mf::Partition& groups,
                      const mf::AdvantageProfile& profile, Address advantages, Address scores, Address normalized,
                      Address mean, Address std, Address degenerate, int threads) {
  const mf::AdvantageInputs in{pointer<const void>(rewards),  bfloat16,        K,
                               pointer<const float>(weights), weights_per_row, pointer<const float>(kl),
                               beta,                          pointer<const float>(lengths)};
  const mf::AdvantageOutputs out{pointer<float>(advantages), pointer<float>(scores), pointer<float>(normalized),
                                 pointer<float>(mean),       pointer<float>(std),    pointer<bool>(degenerate)};
  mf::group_advantages(in, groups, profile, out, threads);
}

void counterfactual_advantages(Address rewards, bool bfloat16, std::int64_t K, Address weights, bool weights_per_row,
                               Address kl, double beta, Address action_weights, std::int64_t actions,
                               const mf::Partition& groups, const mf::AdvantageProfile& profile, Address out,
                               int threads) {
  const mf::AdvantageInputs in{pointer<const void>(rewards),  bfloat16,        K,
                               pointer<const float>(weights), weights_per_row, pointer<const float>(kl),
                               beta,                          nullptr};
  mf::counterfactual_advantages(in, pointer<const float>(action_weights), actions, groups, profile,
                                pointer<float>(out), threads);
}

void conductor_weights(Address h, bool bfloat16, std::int64_t batch, std::int64_t size, std::int64_t actions,
                       Address mean, Address rstd, Address weight, Address bias, double tau, double min_prob,
                       double alpha, bool soft, std::uint64_t seed, std::uint32_t step, std::uint64_t offset,
                       Address weights, Address chosen, Address log_probs, Address entropy, Address probs,
                       int threads) {
  const mf::ConductorHead head{pointer<const float>(mean), pointer<const float>(rstd), pointer<const float>(weight),
                               pointer<const float>(bias), size, actions};
  const mf::ConductorOutputs out{pointer<float>(weights), pointer<std::int64_t>(chosen), pointer<float>(log_probs),
                                 pointer<float>(entropy), pointer<float>(probs)};
  mf::conductor_weights(pointer<const void>(h), bfloat16, batch, head,
                        {tau, min_prob, alpha, soft, seed, step, offset}, out, threads);
}

mf::LogitRows logit_rows(Address x, std::int64_t rows, std::int64_t columns, std::int64_t stride, Address targets) {
  return {pointer<float>(x), rows, columns, stride, pointer<const std::int64_t>(targets)};
}

mf::HeadNumbers head_numbers(Address bias, double scale, double softcap, double temperature,
                             std::int64_t ignore_index) {
  return {pointer<const float>(bias), static_cast<float>(scale), static_cast<float>(softcap),
          static_cast<float>(temperature), ignore_index};
}

mf::RowStatistics row_statistics(Address logprobs, Address peaks, Address totals, Address entropies) {
  return {pointer<float>(logprobs), pointer<float>(peaks), pointer<float>(totals), pointer<float>(entropies)};
}

// Reads the texts of a list of str; they live as long as the list and its strings. Returns whether there is nothing else
// in the list.
bool read_texts(const py::list& keys, std::vector<std::string_view>& found) {
  found.reserve(keys.size());
  for (const py::handle key : keys) {
    if (!PyUnicode_CheckExact(key.ptr())) return false;
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(key.ptr(), &size);
    if (!text) throw py::error_already_set();
    found.emplace_back(text, static_cast<std::size_t>(size));
  }
  return true;
}

mf::MaskType mask_type(int type) { return static_cast<mf::MaskType>(type); }

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels of maestro_fast. Use them through maestro_fast.ops.";
  using without_gil = py::call_guard<py::gil_scoped_release>;

  py::class_<mf::AdvantageProfile>(module, "AdvantageProfile").def(py::init(&advantage_profile));
  py::class_<mf::Partition>(module, "Partition")
      .def(py::init([](std::int64_t groups, std::int64_t batch, std::int64_t size, Address offsets, Address order) {
        return mf::Partition{groups, batch, size, pointer<const std::int64_t>(offsets),
                             pointer<const std::int64_t>(order)};
      }));
  module.def("group_advantages", &group_advantages, without_gil());
  module.def("conductor_weights", &conductor_weights, without_gil());
  py::class_<mf::LogitRows>(module, "LogitRows").def(py::init(&logit_rows));
  py::class_<mf::HeadNumbers>(module, "HeadNumbers").def(py::init(&head_numbers));
  module.def(
      "row_statistics",
      [](const mf::LogitRows& logits, const mf::HeadNumbers& head, Address logprobs, Address peaks, Address totals,
         Address entropies, int threads) {
        mf::row_statistics(logits, head, row_statistics(logprobs, peaks, totals, entropies), threads);
      },
      without_gil());
  module.def(
      "dlogits",
      [](const mf::LogitRows& logits, const mf::HeadNumbers& head, Address peaks, Address totals, Address entropies,
         Address dlogprobs, Address dentropies, int threads) {
        mf::dlogits(logits, head, row_statistics(0, peaks, totals, entropies),
                    {pointer<const float>(dlogprobs), pointer<const float>(dentropies)}, threads);
      },
      without_gil());
  module.def("counterfactual_advantages", &counterfactual_advantages, without_gil());
  module.def(
      "balance_sequences",
      [](Address lengths, std::size_t count, std::int64_t parts, bool equal_size) {
        return mf::balance_sequences(pointer<const std::int64_t>(lengths), count, parts, equal_size);
      },
      without_gil());
  module.def("number_keys", [](const py::list& keys, Address group) {
    std::vector<std::string_view> texts;
    return read_texts(keys, texts) ? mf::number_keys(texts, nullptr, pointer<std::int64_t>(group)).groups : -1;
  });
  module.def("number_session_keys",
             [](const py::list& keys, Address skip, Address group, Address session, Address output) {
               std::vector<std::string_view> texts;
               if (!read_texts(keys, texts)) throw py::type_error("keys: expected a list of str");
               const mf::Numbers found =
                   mf::number_keys(texts, pointer<const bool>(skip), pointer<std::int64_t>(group),
                                   pointer<std::int64_t>(session), pointer<std::int64_t>(output));
               return std::pair(found.groups, found.sessions);
             });
  module.def(
      "order_by_group",
      [](Address ids, std::int64_t batch, std::int64_t groups, Address order, Address offsets) {
        return mf::order_by_group(pointer<const std::int64_t>(ids), batch, groups, pointer<std::int64_t>(order),
                                  pointer<std::int64_t>(offsets));
      },
      without_gil());
  module.def(
      "examine_mask",
      [](Address mask, int type, std::int64_t rows, std::int64_t width, Address count, Address prefix, int threads) {
        return mf::examine_mask(pointer<const void>(mask), mask_type(type), rows, width, pointer<std::int64_t>(count),
                                pointer<bool>(prefix), threads);
      },
      without_gil());
  module.def(
      "spread_over_tokens",
      [](Address values, Address mask, int type, std::int64_t rows, std::int64_t width, Address count, Address prefix,
         Address out, int threads) {
        mf::spread_over_tokens(pointer<const float>(values), pointer<const void>(mask), mask_type(type), rows, width,
                               pointer<const std::int64_t>(count), pointer<const bool>(prefix), pointer<float>(out),
                               threads);
      },
      without_gil());
  module.def(
      "sum_over_tokens",
      [](Address values, std::int64_t rows, std::int64_t width, Address out, int threads) {
        mf::sum_over_tokens(pointer<const float>(values), rows, width, pointer<float>(out), threads);
      },
      without_gil());
  module.def(
      "pack_sequences",
      [](Address lengths, std::size_t count, std::int64_t max_tokens) {
        return mf::pack_sequences(pointer<const std::int64_t>(lengths), count, max_tokens);
      },
      py::arg("lengths"), py::arg("count"), py::arg("max_tokens"), without_gil(),
      "First-fit decreasing over `count` int64 at address `lengths`.");
}
