package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/template"
)

// peer is a proxy that takes TLS on two ports and opens TLS to the backend: from the first port with a full handshake each
// time, from the second resuming.
type peer struct {
	name    string
	program string
	args    func(dir string, conf string) []string
	conf    string // template of its configuration file
	dir     string
	hostDir string // certificate of both listeners and of the backend
	backend int
	dialer  *tlsDialer

	ports [2]int
	p     *process
}

// settings fill a peer's template.
type settings struct {
	Dir, Cert, Key, Both, CA, Host string
	Legs                           []leg
	Backend                        int
}

// leg is one listener; Inner is stunnel's own way from its one half to the other.
type leg struct {
	Name        string
	Port, Inner int
	Resume      bool
}

func (p *peer) start(ctx context.Context) error {
	s := settings{Dir: p.dir, Cert: filepath.Join(p.hostDir, "tls.crt"), Key: filepath.Join(p.hostDir, "tls.key"), Host: hostName,
		Both: filepath.Join(p.hostDir, bothFile), CA: filepath.Join(p.hostDir, "ca.crt"), Backend: p.backend}
	for i, resume := range []bool{false, true} {
		port, err := freePort()
		inner, err2 := freePort()
		if err := errors.Join(err, err2); err != nil {
			return err
		}
		p.ports[i] = port
		s.Legs = append(s.Legs, leg{Name: []string{"full", "resumed"}[i], Port: port, Inner: inner, Resume: resume})
	}
	text, err := p.configuration(s)
	if err != nil {
		return err
	}
	conf, ssl := filepath.Join(p.dir, p.name+".conf"), filepath.Join(p.dir, "openssl.cnf")
	if err := errors.Join(os.WriteFile(conf, []byte(text), 0o600), os.WriteFile(ssl, []byte(opensslConf), 0o600)); err != nil {
		return err
	}
	if p.p, err = launch(p.dir, p.name, []string{"OPENSSL_CONF=" + ssl}, p.program, p.args(p.dir, conf)...); err != nil {
		return err
	}
	return p.p.settle(ctx, func() bool { return listening(p.ports[0]) && listening(p.ports[1]) })
}

// configuration is the text of its file.
func (p *peer) configuration(s settings) (string, error) {
	t, err := template.New(p.name).Parse(p.conf)
	if err != nil {
		return "", err
	}
	var text strings.Builder
	err = t.Execute(&text, s)
	return text.String(), err
}

func (p *peer) stop() {
	if p.p != nil {
		p.p.stop()
		p.p = nil
	}
}

func (p *peer) processes() []*process { return []*process{p.p} }

func (p *peer) dial(resume bool) (stream, error) {
	port := p.ports[0]
	if resume {
		port = p.ports[1]
	}
	c, err := p.dialer.dial(loopback(port), resume, &clientLegs)
	if err != nil {
		return nil, err // not c, which as a stream would not be nil
	}
	return c, nil
}

// opensslConf holds all three to what the relay is measured with, on the legs too where they have no setting of their own.
const opensslConf = `openssl_conf = init
[init]
ssl_conf = ssl
[ssl]
system_default = tls
[tls]
MinProtocol = TLSv1.3
Ciphersuites = TLS_AES_128_GCM_SHA256
Groups = P-256
`

const haproxyConf = `global
    maxconn 9970
    log stdout format raw local0 info
    ssl-default-bind-options ssl-min-ver TLSv1.3
    ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
    ssl-default-bind-curves P-256
    ssl-default-server-options ssl-min-ver TLSv1.3
    ssl-default-server-ciphersuites TLS_AES_128_GCM_SHA256
defaults
    mode tcp
    log global
    option tcplog
    maxconn 9970
    timeout connect 10s
    timeout client 1h
    timeout server 1h
{{range .Legs}}
frontend {{.Name}}
    bind 127.0.0.1:{{.Port}} ssl crt {{$.Both}} backlog 4096
    default_backend {{.Name}}
backend {{.Name}}
    server host 127.0.0.1:{{$.Backend}} ssl verify required ca-file {{$.CA}} sni str({{$.Host}}){{if not .Resume}} no-ssl-reuse{{end}}
{{end}}`

const nginxConf = `daemon off;
user root;
pid {{.Dir}}/nginx.pid;
error_log stderr notice;
worker_processes auto;
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
events { worker_connections 19900; }
stream {
    log_format session '$remote_addr $time_iso8601 $status $bytes_sent $bytes_received $session_time';
    access_log {{.Dir}}/nginx-sessions.log session;
    ssl_protocols TLSv1.3;
    ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
    ssl_ecdh_curve prime256v1;
    ssl_certificate {{.Cert}};
    ssl_certificate_key {{.Key}};
    ssl_session_cache shared:tls:10m;
    proxy_ssl on;
    proxy_ssl_protocols TLSv1.3;
    proxy_ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
    proxy_ssl_verify on;
    proxy_ssl_trusted_certificate {{.CA}};
    proxy_ssl_server_name on;
    proxy_ssl_name {{.Host}};
    proxy_timeout 1h;
{{range .Legs}}
    server {
        listen 127.0.0.1:{{.Port}} ssl backlog=4096;
        proxy_pass 127.0.0.1:{{$.Backend}};
        proxy_ssl_session_reuse {{if .Resume}}on{{else}}off{{end}};
    }
{{end}}}
`

const stunnelConf = `foreground = yes
pid =
debug = notice
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
sslVersionMin = TLSv1.3
ciphersuites = TLS_AES_128_GCM_SHA256
curves = P-256
{{range .Legs}}
[{{.Name}}-client]
accept = 127.0.0.1:{{.Port}}
connect = 127.0.0.1:{{.Inner}}
cert = {{$.Cert}}
key = {{$.Key}}
[{{.Name}}-host]
client = yes
accept = 127.0.0.1:{{.Inner}}
connect = 127.0.0.1:{{$.Backend}}
verifyChain = yes
CAfile = {{$.CA}}
checkHost = {{$.Host}}
sni = {{$.Host}}
sessionResume = {{if .Resume}}yes{{else}}no{{end}}
{{end}}`

// peers are the programs of Debian and our own yardstick.
func peers(dir, hostDir string, m *backend) ([]*peer, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	all := []*peer{
		{name: "haproxy", program: "/usr/sbin/haproxy", conf: haproxyConf, args: func(_, conf string) []string { return []string{"-db", "-f", conf} }},
		{name: "nginx", program: "/usr/sbin/nginx", conf: nginxConf, args: func(dir, conf string) []string { return []string{"-p", dir, "-c", conf} }},
		{name: "stunnel", program: "/usr/bin/stunnel4", conf: stunnelConf, args: func(_, conf string) []string { return []string{conf} }},
		{name: "naive", program: self, conf: naiveConf, args: func(_, conf string) []string { return []string{naiveCommand, conf} }},
	}
	for _, p := range all {
		p.dir, p.hostDir, p.backend, p.dialer = filepath.Join(dir, p.name), hostDir, m.port, newTLSDialer(hostName)
		if err := os.MkdirAll(p.dir, 0o755); err != nil {
			return nil, fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return all, nil
}
