package main

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"slices"
	"time"
)

// metric is one row of the table.
type metric struct {
	// Key is stable: goals and saved results name metrics by it.
	Key   string `json:"key"`
	Group string `json:"group"`
	Title string `json:"title"`
	Unit  string `json:"unit"`
	// Up says that more is better.
	Up bool `json:"up,omitempty"`
}

// sample is one measurement: of one contender in one round.
type sample struct {
	Metric    string  `json:"metric"`
	Contender string  `json:"contender"`
	Round     int     `json:"round"`
	Value     float64 `json:"value"`
}

// report is all that a run found.
type report struct {
	Machine    string    `json:"machine"`
	Versions   string    `json:"versions"`
	Began      time.Time `json:"began"`
	Took       string    `json:"took"`
	Rounds     int       `json:"rounds"`
	Contenders []string  `json:"contenders"`
	Metrics    []metric  `json:"metrics"`
	Samples    []sample  `json:"samples"`
}

// add notes a measurement and, the first time, its metric.
func (r *report) add(m metric, contender string, round int, value float64) {
	if !slices.ContainsFunc(r.Metrics, func(o metric) bool { return o.Key == m.Key }) {
		r.Metrics = append(r.Metrics, m)
	}
	r.Samples = append(r.Samples, sample{m.Key, contender, round, value})
}

// values are the measurements of one cell, by round.
func (r *report) values(metric, contender string) map[int]float64 {
	v := map[int]float64{}
	for _, s := range r.Samples {
		if s.Metric == metric && s.Contender == contender {
			v[s.Round] = s.Value
		}
	}
	return v
}

// cell is one cell's summary; ok is false where nothing was measured.
func (r *report) cell(metric, contender string) (c spread, ok bool) {
	var v []float64
	for _, x := range r.values(metric, contender) {
		v = append(v, x)
	}
	return summarise(v), len(v) > 0
}

func (r *report) save(file string) error {
	data, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(data, '\n'), 0o644)
}

func load(file string) (*report, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	r := &report{}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return r, nil
}

// spread is the median of several rounds and how far they went.
type spread struct{ Median, Min, Max float64 }

func summarise(v []float64) spread {
	if len(v) == 0 {
		return spread{}
	}
	v = slices.Sorted(slices.Values(v))
	mid := v[len(v)/2]
	if len(v)%2 == 0 {
		mid = (v[len(v)/2-1] + mid) / 2
	}
	return spread{mid, v[0], v[len(v)-1]}
}

// quantile is the value that a part q of sorted lies at or below (nearest rank).
func quantile(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	i := int(math.Ceil(q*float64(len(sorted)))) - 1
	return sorted[min(max(i, 0), len(sorted)-1)]
}

// number writes a value with three digits that tell something.
func number(v float64) string {
	switch a := math.Abs(v); {
	case a >= 100:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}
