package relay

// writeError says that the other leg failed, not the one that was read.
type writeError struct{ error }

// copyHostToClient puts the host's bytes into packets for the client. It returns why it ended: io.EOF when the host has.
func (s *session) copyHostToClient() error {
	most := maxBatch
	if s.client.tsgu {
		most = maxTSGU
	}
	return pump(s.host, most, func(b *batch) error {
		s.count(&s.toClient, b)
		b.frame(s.client.framing)
		if err := s.client.leg.send(b); err != nil {
			return writeError{err}
		}
		return nil
	})
}

// copyClientToHost takes the client's frames off and passes what is left on. It returns why it ended: io.EOF when the
// client has said good-bye.
func (s *session) copyClientToHost() error {
	return pump(s.client.from, maxBatch, func(b *batch) error {
		uerr := s.client.unwrapAll(b)
		if b.content > 0 {
			s.count(&s.toHost, b)
			if err := s.host.send(b); err != nil && !s.ending.Load() {
				return writeError{err}
			}
		}
		return uerr
	})
}

// pump hands pass one batch of at most most bytes after the other, until the leg ends or pass fails. It waits for the leg without a batch in
// hand, unless part of a record has come.
func pump(from *leg, most int, pass func(b *batch) error) error {
	b := getBatch()
	b.most = most
	defer func() { putBatch(b) }()
	for {
		err := from.fill(b, readSize)
		if b.spans > 0 {
			if err := pass(b); err != nil {
				return err
			}
		}
		if err == errAgain {
			if b.start == b.end {
				putBatch(b)
				b = nil
			}
			err = from.tcp.wait()
			if b == nil {
				b = getBatch()
				b.most = most
			}
		}
		if err != nil {
			return err
		}
	}
}

// discard reads a leg on which nothing is to be said, until it ends. Nobody else may read it.
func (l *leg) discard() {
	l.tcp.polling = true
	pump(l, maxBatch, func(*batch) error { return nil })
}
