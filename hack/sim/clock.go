package main

import (
	"container/heap"
	"time"
)

// clock is the simulation's: it jumps from event to event. Events of one moment happen in the order they were made in.
type clock struct {
	now   time.Duration
	queue events
	made  uint64
}

type event struct {
	at   time.Duration
	made uint64
	do   func()
}

func (c *clock) after(d time.Duration, do func()) {
	c.made++
	heap.Push(&c.queue, event{c.now + max(d, 0), c.made, do})
}

// run lets all happen that is due before end.
func (c *clock) run(end time.Duration) {
	for len(c.queue) > 0 && c.queue[0].at < end {
		e := heap.Pop(&c.queue).(event)
		c.now = e.at
		e.do()
	}
	c.now = end
}

type events []event

func (q events) Len() int { return len(q) }
func (q events) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].made < q[j].made
}
func (q events) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *events) Push(e any)   { *q = append(*q, e.(event)) }
func (q *events) Pop() any {
	old := *q
	e := old[len(old)-1]
	old[len(old)-1] = event{}
	*q = old[:len(old)-1]
	return e
}
